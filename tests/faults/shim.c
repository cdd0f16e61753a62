/* Preloaded into a process: its Nth change to the file system is its last, or fails with a chosen error.
 *
 * arm(n, error) starts counting; at the nth call the process is killed (error 0; a write happens by half first) or the
 * call fails with that errno. counted() is the number of calls since. Works for Python, C++ and Rust alike. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static long nth = -1, count = 0;
static int failure = 0;

void arm(long n, int error) {
  nth = n;
  failure = error;
  count = 0;
}

long counted(void) { return count; }

static int now(void) { return nth >= 0 && ++count == nth; }

static int stop(void) {
  if (!failure) kill(getpid(), SIGKILL);
  errno = failure;
  return -1;
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define WRAP(result, name, parameters, arguments) \
  result name parameters { return now() ? stop() : NEXT(name) arguments; }

WRAP(int, fsync, (int fd), (fd))
WRAP(int, fdatasync, (int fd), (fd))
WRAP(int, ftruncate, (int fd, off_t size), (fd, size))
WRAP(int, ftruncate64, (int fd, off64_t size), (fd, size))
WRAP(int, rename, (const char* a, const char* b), (a, b))
WRAP(int, renameat, (int f, const char* a, int t, const char* b), (f, a, t, b))
WRAP(int, mkdir, (const char* path, mode_t mode), (path, mode))
WRAP(int, mkdirat, (int fd, const char* path, mode_t mode), (fd, path, mode))
WRAP(int, rmdir, (const char* path), (path))
WRAP(int, unlink, (const char* path), (path))
WRAP(int, unlinkat, (int fd, const char* path, int flags), (fd, path, flags))
WRAP(int, renameat2, (int f, const char* a, int t, const char* b, unsigned flags), (f, a, t, b, flags))
WRAP(int, link, (const char* a, const char* b), (a, b))
WRAP(int, symlink, (const char* a, const char* b), (a, b))
WRAP(int, fallocate, (int fd, int mode, off_t at, off_t size), (fd, mode, at, size))
WRAP(int, fallocate64, (int fd, int mode, off64_t at, off64_t size), (fd, mode, at, size))
WRAP(ssize_t, sendfile, (int to, int from, off_t* at, size_t size), (to, from, at, size))
WRAP(ssize_t, sendfile64, (int to, int from, off64_t* at, size_t size), (to, from, at, size))
WRAP(ssize_t, copy_file_range, (int f, off64_t* i, int t, off64_t* o, size_t n, unsigned flags), (f, i, t, o, n, flags))
WRAP(ssize_t, writev, (int fd, const struct iovec* parts, int n), (fd, parts, n))

/* A kill comes after the first half of what is written. */
#define WRITE(name, parameters, arguments, half)    \
  ssize_t name parameters {                         \
    if (!now()) return NEXT(name) arguments;        \
    if (!failure && NEXT(name) half < 0) return -1; \
    return stop();                                  \
  }
WRITE(write, (int fd, const void* data, size_t size), (fd, data, size), (fd, data, size / 2))
WRITE(pwrite, (int fd, const void* data, size_t size, off_t at), (fd, data, size, at), (fd, data, size / 2, at))
WRITE(pwrite64, (int fd, const void* data, size_t size, off64_t at), (fd, data, size, at), (fd, data, size / 2, at))

#define OPEN(name, before, given)                                           \
  int name(before const char* path, int flags, ...) {                       \
    va_list rest;                                                           \
    va_start(rest, flags);                                                  \
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
    va_end(rest);                                                           \
    if ((flags & O_ACCMODE) != O_RDONLY && now()) return stop();            \
    return NEXT(name)(given path, flags, mode);                             \
  }
#define COMMA ,
OPEN(open, , )
OPEN(open64, , )
OPEN(openat, int fd COMMA, fd COMMA)
OPEN(openat64, int fd COMMA, fd COMMA)
