// The Python face: types in, errors out. Arrays are never converted, sizes are checked below, the GIL is released.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <mutex>
#include <optional>
#include <span>
#include <tuple>

#include "attention.h"
#include "batch_reader.h"
#include "crc32c.h"
#include "cross_entropy.h"
#include "packing.h"
#include "processor.h"
#include "products.h"
#include "sample_order.h"
#include "token_writer.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace llamahome {
namespace {

template <typename T, std::size_t Dims = 1>
using Array = nb::ndarray<T, nb::ndim<Dims>, nb::c_contig, nb::device::cpu>;
template <typename T>
using NumpyArray = nb::ndarray<nb::numpy, T, nb::ndim<1>, nb::c_contig>;

using Ids = Array<const std::int64_t>;
using NoGil = nb::call_guard<nb::gil_scoped_release>;

template <typename A>
auto as_span(const A& array) {
  return std::span(array.data(), array.size());
}

// str, bytes or os.PathLike, in the file system's encoding.
std::string file_system_path(nb::handle path) {
  PyObject* bytes = nullptr;
  if (!PyUnicode_FSConverter(path.ptr(), &bytes)) throw nb::python_error();
  const nb::object owner = nb::steal(bytes);
  return std::string(PyBytes_AsString(bytes), static_cast<std::size_t>(PyBytes_Size(bytes)));
}

// Two threads may hold the same writer, and neither holds the GIL.
class SharedWriter {
 public:
  SharedWriter(nb::handle path, std::uint32_t token_width) : writer_(file_system_path(path), token_width) {}

  void append(const Array<const std::uint32_t>& ids, const Array<const bool>& trained, const Ids& lengths,
              const Array<const std::uint64_t>& sources) {
    if (sources.size() != lengths.size() || trained.size() != ids.size())
      throw std::invalid_argument("arrays of unequal size");
    std::uint64_t total = 0;
    for (const std::int64_t length : as_span(lengths)) {
      if (length < 1 || static_cast<std::uint64_t>(length) > ids.size() - total)
        throw std::invalid_argument("the lengths do not add up to the tokens");
      total += static_cast<std::uint64_t>(length);
    }
    if (total != ids.size()) throw std::invalid_argument("the lengths do not add up to the tokens");
    const std::lock_guard lock(mutex_);
    std::size_t at = 0;
    for (std::size_t i = 0; i < lengths.size(); ++i) {
      const auto length = static_cast<std::size_t>(lengths.data()[i]);
      writer_.append(as_span(ids).subspan(at, length), as_span(trained).subspan(at, length), sources.data()[i]);
      at += length;
    }
  }

  std::uint32_t finish() {
    const std::lock_guard lock(mutex_);
    return writer_.finish();
  }

  template <typename Get>
  std::uint64_t get(Get get) {
    const std::lock_guard lock(mutex_);
    return get(writer_);
  }

 private:
  std::mutex mutex_;
  TokenFileWriter writer_;
};

NumpyArray<std::int64_t> to_numpy(std::vector<std::int64_t>&& values) {
  auto* kept = new std::vector<std::int64_t>(std::move(values));
  nb::capsule owner(kept, [](void* p) noexcept { delete static_cast<std::vector<std::int64_t>*>(p); });
  return NumpyArray<std::int64_t>(kept->data(), {kept->size()}, owner);
}

void raise_damaged(const DamagedFile& error) {
  try {
    const nb::object path = nb::steal(PyUnicode_DecodeFSDefault(error.path.c_str()));
    const nb::object type = nb::module_::import_("llamahome.errors").attr("DataError");
    const nb::object where = nb::str("{}: byte {}").attr("format")(path, error.offset);
    PyErr_SetObject(type.ptr(), type(error.what(), "where"_a = where, "fix"_a = "prepare the data again").ptr());
  } catch (nb::python_error& failure) {
    failure.restore();
  }
}

void translate(const std::exception_ptr& error, void*) {
  try {
    std::rethrow_exception(error);
  } catch (const DamagedFile& e) {
    raise_damaged(e);
  } catch (const std::filesystem::filesystem_error& e) {
    errno = e.code().value();
    PyErr_SetFromErrnoWithFilename(PyExc_OSError, e.path1().c_str());
  }
}

void bind_reader(nb::module_& m) {
  nb::class_<BatchReader>(m, "BatchReader", "Reads batches from the shards of a token store; thread-safe.")
      .def(
          "__init__",
          [](BatchReader* self, const std::vector<nb::object>& paths, bool mapped) {
            std::vector<std::string> names;
            for (const nb::object& path : paths) names.push_back(file_system_path(path));
            new (self) BatchReader(names, mapped ? ReadMode::kMap : ReadMode::kRead);
          },
          "paths"_a, "mapped"_a = true)
      .def_prop_ro("num_documents", &BatchReader::num_documents)
      .def_prop_ro("num_tokens", &BatchReader::num_tokens)
      .def_prop_ro("num_trained", &BatchReader::num_trained)
      .def(
          "shards",
          [](const BatchReader& self) {
            nb::list shards;
            for (const auto& file : self.files()) {
              const Header& h = file->header();
              shards.append(nb::make_tuple(h.num_documents, h.num_tokens, h.num_trained, h.token_width, h.max_token,
                                           h.file_size, file->header_crc()));
            }
            return shards;
          },
          nb::sig("def shards(self) -> list[tuple[int, int, int, int, int, int, int]]"),
          "Per shard: documents, tokens, trained tokens, token width, largest id, bytes, checksum of the header.")
      .def(
          "lengths",
          [](const BatchReader& self, const Ids& ids, const Array<std::uint32_t>& out) {
            self.lengths(as_span(ids), as_span(out));
          },
          "ids"_a.noconvert(), "out"_a.noconvert(), NoGil())
      .def(
          "trained_counts",
          [](const BatchReader& self, const Ids& ids, const Array<std::uint32_t>& out) {
            self.trained_counts(as_span(ids), as_span(out));
          },
          "ids"_a.noconvert(), "out"_a.noconvert(), NoGil())
      .def(
          "sources",
          [](const BatchReader& self, const Ids& ids, const Array<std::uint64_t>& out) {
            self.sources(as_span(ids), as_span(out));
          },
          "ids"_a.noconvert(), "out"_a.noconvert(), NoGil())
      .def(
          "pack",
          [](const BatchReader& self, const Ids& ids, const Array<std::int64_t>& input_ids,
             const Array<std::int64_t>& labels, const Array<std::int64_t>& position_ids,
             const Array<std::int32_t>& cu_seqlens) {
            return self.pack(as_span(ids), as_span(input_ids), as_span(labels), as_span(position_ids),
                             as_span(cu_seqlens));
          },
          "ids"_a.noconvert(), "input_ids"_a.noconvert(), "labels"_a.noconvert(), "position_ids"_a.noconvert(),
          "cu_seqlens"_a.noconvert(), NoGil(), "Lays documents end to end; returns the number of trained tokens.")
      .def(
          "rows",
          [](const BatchReader& self, const Ids& rows, const Array<std::int64_t, 2>& input_ids,
             const Array<std::int64_t, 2>& labels) {
            if (input_ids.shape(0) != rows.size() || labels.shape(0) != rows.size() ||
                input_ids.shape(1) != labels.shape(1))
              throw std::invalid_argument("the buffers need one row for each row asked for");
            return self.rows(as_span(rows), input_ids.shape(1), as_span(input_ids), as_span(labels));
          },
          "rows"_a.noconvert(), "input_ids"_a.noconvert(), "labels"_a.noconvert(), NoGil(),
          "Fixed-width rows of the stream of all tokens; returns the number of trained tokens.")
      .def(
          "prefetch", [](BatchReader& self, const Ids& ids) { self.prefetch(as_span(ids)); }, "ids"_a.noconvert(),
          NoGil())
      .def(
          "prefetch_rows",
          [](BatchReader& self, const Ids& rows, std::uint64_t width) { self.prefetch_rows(as_span(rows), width); },
          "rows"_a.noconvert(), "width"_a, NoGil())
      .def("verify", &BatchReader::verify, "shard"_a, NoGil(), "Checks every byte of one shard.");
}

void bind_writer(nb::module_& m) {
  nb::class_<SharedWriter>(m, "TokenFileWriter", "Writes one shard of a token store.")
      .def(nb::init<nb::handle, std::uint32_t>(), "path"_a, "token_width"_a)
      .def("append", &SharedWriter::append, "ids"_a.noconvert(), "trained"_a.noconvert(), "lengths"_a.noconvert(),
           "sources"_a.noconvert(), NoGil(), "Adds documents that lie end to end in `ids` and `trained`.")
      .def("finish", &SharedWriter::finish, NoGil(), "Makes the file durable; returns the checksum of its header.")
      .def_prop_ro("num_documents",
                   [](SharedWriter& s) { return s.get([](auto& w) { return w.header().num_documents; }); })
      .def_prop_ro("num_tokens", [](SharedWriter& s) { return s.get([](auto& w) { return w.header().num_tokens; }); })
      .def_prop_ro("num_trained", [](SharedWriter& s) { return s.get([](auto& w) { return w.header().num_trained; }); })
      .def_prop_ro("file_size", [](SharedWriter& s) { return s.get([](auto& w) { return w.header().file_size; }); })
      .def_prop_ro("index_bytes", [](SharedWriter& s) { return s.get([](auto& w) { return w.index_bytes(); }); });
}

void bind_order_and_packing(nb::module_& m) {
  nb::class_<SampleOrder>(m, "SampleOrder",
                          "The samples of an epoch, [0, size) in an order fixed by (seed, epoch), in O(1) memory.")
      .def(nb::init<std::uint64_t, std::uint64_t, std::uint64_t, bool, std::uint64_t>(), "size"_a, "seed"_a, "epoch"_a,
           "shuffle"_a = true, "block"_a = 0)
      .def(
          "fill",
          [](const SampleOrder& self, std::uint64_t start, const Array<std::int64_t>& out) {
            self.fill(start, as_span(out));
          },
          "start"_a, "out"_a.noconvert(), NoGil(), "Writes the samples at positions start, start + 1, ...");
  m.def(
      "plan_packing",
      [](const Array<const std::uint32_t>& lengths, std::uint64_t budget) {
        PackingPlan plan;
        {
          const nb::gil_scoped_release release;
          plan = plan_packing(as_span(lengths), budget);
        }
        return nb::make_tuple(to_numpy(std::move(plan.order)), to_numpy(std::move(plan.bounds)));
      },
      "lengths"_a.noconvert(), "budget"_a,
      nb::sig("def plan_packing(lengths: numpy.typing.NDArray[numpy.uint32], budget: int) -> "
              "tuple[numpy.typing.NDArray[numpy.int64], numpy.typing.NDArray[numpy.int64]]"),
      "Best-fit rows of whole documents: (order, bounds); row r is order[bounds[r]:bounds[r + 1]].");
}

template <typename Number>
using Heads = Array<const Number, 3>;
template <typename Number>
using HeadsOut = Array<Number, 3>;

template <typename Number>
AttentionShape shape_of(const Heads<Number>& query, const Heads<Number>& key,
                        const Array<const std::int32_t>& cu_seqlens, float scale, int threads) {
  const auto edges = as_span(cu_seqlens);
  if (query.shape(0) != key.shape(0) || query.shape(2) != key.shape(2) || query.shape(2) % 16 != 0 ||
      key.shape(1) == 0 || query.shape(1) % key.shape(1) != 0)
    throw std::invalid_argument("queries and keys do not belong together, or a head's size is no multiple of 16");
  if (edges.empty() || edges.front() != 0 || !std::is_sorted(edges.begin(), edges.end()) ||
      static_cast<std::size_t>(edges.back()) > query.shape(0))
    throw std::invalid_argument("the samples' boundaries must rise from 0 to the number of tokens at most");
  const auto size = [](std::size_t n) { return static_cast<std::int64_t>(n); };
  return {edges.data(),
          size(edges.size()) - 1,
          size(query.shape(0)),
          size(query.shape(1)),
          size(key.shape(1)),
          size(query.shape(2)),
          scale,
          threads};
}

template <typename A, typename B>
void need_same_shape(const A& a, const B& b) {
  for (std::size_t i = 0; i < 3; ++i)
    if (a.shape(i) != b.shape(i)) throw std::invalid_argument("arrays of unequal shape");
}

template <typename A, typename B>
void need_lse(const A& lse, const B& query) {
  if (lse.shape(0) != query.shape(1) || lse.shape(1) != query.shape(0))
    throw std::invalid_argument("the log-sum-exp must be [heads, tokens]");
}

template <typename Number>
void bind_attention(nb::module_& m) {
  using Heads = Heads<Number>;
  using HeadsOut = HeadsOut<Number>;
  m.def(
      "attention_forward",
      [](const Heads& query, const Heads& key, const Heads& value, const Array<const std::int32_t>& cu_seqlens,
         float scale, int threads, const HeadsOut& out, const Array<float, 2>& lse) {
        const AttentionShape shape = shape_of<Number>(query, key, cu_seqlens, scale, threads);
        need_same_shape(key, value);
        need_same_shape(query, out);
        need_lse(lse, query);
        attention_forward(shape, query.data(), key.data(), value.data(), out.data(), lse.data());
      },
      "query"_a.noconvert(), "key"_a.noconvert(), "value"_a.noconvert(), "cu_seqlens"_a.noconvert(), "scale"_a,
      "threads"_a, "out"_a.noconvert(), "lse"_a.noconvert(), NoGil(),
      "Causal attention of packed samples; arrays are [tokens, heads, size] in fp32 or of bf16's bits, lse [heads, "
      "tokens].");
  m.def(
      "attention_backward",
      [](const Heads& grad, const Heads& query, const Heads& key, const Heads& value, const Heads& out,
         const Array<const float, 2>& lse, const Array<const std::int32_t>& cu_seqlens, float scale, int threads,
         const HeadsOut& d_query, const HeadsOut& d_key, const HeadsOut& d_value) {
        const AttentionShape shape = shape_of<Number>(query, key, cu_seqlens, scale, threads);
        for (const Heads& same : {grad, out}) need_same_shape(query, same);
        need_same_shape(query, d_query);
        need_same_shape(key, value);
        for (const HeadsOut& same : {d_key, d_value}) need_same_shape(key, same);
        need_lse(lse, query);
        attention_backward(shape, grad.data(), query.data(), key.data(), value.data(), out.data(), lse.data(),
                           d_query.data(), d_key.data(), d_value.data());
      },
      "grad"_a.noconvert(), "query"_a.noconvert(), "key"_a.noconvert(), "value"_a.noconvert(), "out"_a.noconvert(),
      "lse"_a.noconvert(), "cu_seqlens"_a.noconvert(), "scale"_a, "threads"_a, "d_query"_a.noconvert(),
      "d_key"_a.noconvert(), "d_value"_a.noconvert(), NoGil(),
      "The gradients of query, key and value from that of out.");
}

using MatrixAt = std::tuple<std::uintptr_t, std::int64_t, bool>;  // address, stride, turned

Matrix matrix_of(const MatrixAt& at, std::int64_t size, bool in_pairs) {
  const auto [address, stride, turned] = at;
  if (in_pairs && (size % 2 != 0 || stride % 2 != 0 || address % 4 != 0))
    throw std::invalid_argument("a matrix that is read in pairs of numbers does not lie in pairs");
  return {reinterpret_cast<const Bf16*>(address), stride, turned};
}

// By addresses: numpy's view of a tensor would keep the tensor from being resized ever after, as FSDP2 does.
void bind_products(nb::module_& m) {
  m.def(
      "sum_products",
      [](const std::vector<std::tuple<MatrixAt, MatrixAt, std::int64_t>>& products, std::optional<std::uintptr_t> start,
         std::uintptr_t out, std::int64_t rows, std::int64_t columns, int threads) {
        std::vector<Product> checked;
        if (columns % 16 != 0) throw std::invalid_argument("the columns of the result are no multiple of 16");
        for (const auto& [left, right, size] : products) {
          const bool by_columns = std::get<2>(left);
          if (by_columns && rows % 16 != 0)
            throw std::invalid_argument("the rows of a transposed left matrix are no multiple of 16");
          checked.push_back({matrix_of(left, size, !by_columns), matrix_of(right, size, std::get<2>(right)), size});
        }
        sum_products(checked.data(), static_cast<std::int64_t>(checked.size()),
                     reinterpret_cast<const Bf16*>(start.value_or(0)), reinterpret_cast<Bf16*>(out), rows, columns,
                     threads);
      },
      "products"_a, "start"_a.none(), "out"_a, "rows"_a, "columns"_a, "threads"_a, NoGil(),
      "out [rows, columns] = start + the sum of left [rows, size] @ right [size, columns] over (left, right, size), "
      "added up in fp32 and rounded once. A matrix of bf16's bits is (address, stride, turned), start and out are "
      "addresses of whole rows; whoever calls answers for them.");
}

void bind_cross_entropy(nb::module_& m) {
  m.def(
      "cross_entropy",
      [](const Array<Bf16, 2>& logits, const Ids& labels, float factor, bool gradient, int threads,
         const Array<float>& losses) {
        const auto rows = static_cast<std::int64_t>(logits.shape(0)), size = static_cast<std::int64_t>(logits.shape(1));
        if (labels.size() != logits.shape(0) || losses.size() != logits.shape(0))
          throw std::invalid_argument("a label and a place for its loss belong to each row of logits");
        for (const std::int64_t label : as_span(labels))
          if (label < 0 || label >= size)
            throw std::runtime_error("label " + std::to_string(label) + " is no row of the weight, which has " +
                                     std::to_string(size));
        cross_entropy(logits.data(), labels.data(), rows, size, factor, gradient, threads, losses.data());
      },
      "logits"_a.noconvert(), "labels"_a.noconvert(), "factor"_a, "gradient"_a, "threads"_a, "losses"_a.noconvert(),
      NoGil(), "The loss of each row of logits, of bf16's bits; their gradient by `factor` replaces them if wanted.");
}

void bind_processor(nb::module_& m) {
  m.def("has_avx512", &has_avx512, "Whether the processor has what attention in fp32 needs: AVX-512 with BW and VL.");
  m.def("has_avx512_bf16", &has_avx512_bf16, "Whether it has what attention in bf16 needs.");
  m.def("is_amd", &is_amd, "Whether the processor is AMD's.");
}

}  // namespace
}  // namespace llamahome

NB_MODULE(_C, m) {
  using namespace llamahome;
  m.doc() = "Token store, sample order, packing and a CPU's attention in C++.";
  nb::register_exception_translator(translate);
  bind_reader(m);
  bind_writer(m);
  bind_order_and_packing(m);
  bind_attention<Bf16>(m);
  bind_attention<float>(m);
  bind_products(m);
  bind_cross_entropy(m);
  bind_processor(m);
  m.def(
      "crc32c",
      [](nb::bytes data, bool portable) {
        return portable ? crc32c_portable(data.data(), data.size()) : crc32c(data.data(), data.size());
      },
      "data"_a, "portable"_a = false, "CRC-32C of bytes; `portable` avoids the processor's instruction.");
}
