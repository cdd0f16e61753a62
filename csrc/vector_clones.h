// One source, several instruction sets: the loader picks the widest that the processor has.
#pragma once

// Needs the ifunc mechanism of glibc; sanitizers run too late for its resolvers. Elsewhere the build's own target
// counts.
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__) && \
    !defined(LLAMAHOME_SANITIZE)
#define LLAMAHOME_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define LLAMAHOME_CLONES
#endif
