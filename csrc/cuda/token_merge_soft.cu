// The tensor side of soft merging on a GPU.
#include <tuple>

#include "launch.h"
#include "token_merge_soft_sums.cuh"
#include "token_merge_tensors.h"

namespace tokenops {
namespace {

// float16 holds no factor that would bring rows of any size to a length of one
template <class T>
constexpr int kUsualOf = std::is_same_v<T, f16> ? 8 : kUsual;

template <class T>
PlainRows<T> rows_of(const char* name, const Tensor& t, const Tensor& x, int64_t rows) {
  check_tokens(name, t, x.scalar_type(), x.size(0), rows, x.size(2));
  return {
      static_cast<const T*>(t.const_data_ptr()), t.stride(0), t.stride(1), static_cast<int>(rows), static_cast<int>(x.size(2)), is_wide(t)};
}

struct SoftCall {
  const Tensor &x, &metric, &meta;
  int64_t batch, tokens, metas, channels, width;

  SoftCall(const Tensor& x, const Tensor& metric, const Tensor& meta)
      : x(x),
        metric(metric),
        meta(meta),
        batch(x.size(0)),
        tokens(x.size(1)),
        metas(meta.size(1)),
        channels(x.size(2)),
        width(metric.size(2)) {
    check_tokens("metric", metric, x.scalar_type(), batch, tokens, width);
    check_tokens("meta", meta, x.scalar_type(), batch, metas, width);
    STD_TORCH_CHECK(metas > 0 && channels > 0 && width > 0 && width % 8 == 0,
                    "there must be meta tokens and columns, of what is compared a "
                    "multiple of 8");
  }

  // terms [3, B, N]: origin, weight, share; scratch: as of a search without lists
  template <class T>
  SoftArguments<T> arguments(double temperature, const OptionalTensor& learned, const OptionalTensor& mass, bool normalize,
                             const Tensor& lse, const Tensor& terms, const Tensor& scratch) const {
    SoftArguments<T> p{};
    Words words(scratch);
    p.a = side_of<T>("metric", metric, {}, {}, {}, {}, {}, 0, kTokens, false, words);
    p.b = side_of<T>("meta", meta, {}, {}, {}, {}, {}, 1, kMetas, false, words);
    take_blocks(p.a.of, batch, words), take_blocks(p.b.of, batch, words);
    p.samples = static_cast<int>(batch), p.width = static_cast<int>(width);
    p.normalize = normalize, p.usual = normalize ? kUsualOf<T> : 0;
    p.x = rows_of<T>("x", x, x, tokens);
    p.tokens = static_cast<int>(tokens), p.metas = static_cast<int>(metas);
    p.temperature = static_cast<float>(temperature);
    if (learned) {
      check_dense("learned", *learned, ScalarType::Float, {});
      p.learned = learned->const_data_ptr<float>();
    }
    if (mass) {
      check_per_token("mass", *mass, ScalarType::Float, batch, tokens);
      p.mass = mass->const_data_ptr<float>(), p.mass_sample = broadcast_stride(*mass, 0), p.mass_token = mass->stride(1);
    }
    check_dense("lse", lse, ScalarType::Float, {batch, tokens});
    check_dense("terms", terms, ScalarType::Float, {3, batch, tokens});
    p.lse = const_cast<float*>(lse.const_data_ptr<float>());
    p.origin = terms.mutable_data_ptr<float>(), p.weight = p.origin + batch * tokens, p.share = p.weight + batch * tokens;
    return p;
  }

  template <class T>
  void describe_rows(const SoftArguments<T>& p) const {
    launch(x, describe<T>, batch * (p.a.of.blocks + p.b.of.blocks), kDescribeThreads, sizeof(DescribeShared),
           static_cast<const DescribeArguments<T>&>(p));
  }

  template <bool kByMeta, bool kGradient, class T>
  void run_gather(SoftArguments<T> p, int64_t columns) const {
    constexpr int kColumns = kResultChunks<kByMeta> * kChunk<T>;
    p.columns = static_cast<int>(columns);
    // without a result only the first block of columns has something to do
    p.blocks = kByMeta || p.result ? static_cast<int>((columns + kColumns - 1) / kColumns) : 1;
    const int64_t blocks = batch * (kByMeta ? p.b.of.blocks : p.a.of.blocks) * p.blocks * p.splits;
    launch(x, gather<T, kByMeta, kGradient>, blocks, kSoftThreads, sizeof(GatherShared<T, kByMeta>), p);
  }

  // by meta token: parts [splits, B, M, columns] and sums of weights [2, splits, B, M], then the result
  template <bool kGradient, class T>
  void run_by_meta(FinishArguments<T> f, const Tensor& parts, const Tensor& part_sums, int64_t columns) const {
    const int64_t splits = parts.size(0);
    STD_TORCH_CHECK(splits > 0, "there must be parts");
    check_dense("parts", parts, ScalarType::Float, {splits, batch, metas, columns});
    check_dense("part_sums", part_sums, ScalarType::Float, {2, splits, batch, metas});
    f.p.part = parts.mutable_data_ptr<float>(), f.p.part_sum = part_sums.mutable_data_ptr<float>();
    f.p.splits = static_cast<int>(splits), f.p.columns = static_cast<int>(columns);
    run_gather<true, kGradient>(f.p, columns);
    launch(x, finish<T>, (batch * metas + kSoftWarps - 1) / kSoftWarps, kSoftThreads, 0, f);
  }
};

void soft(Tensor out, Tensor mass_out, Tensor lse, Tensor scratch, Tensor terms, Tensor parts, Tensor part_sums, Tensor x, Tensor metric,
          Tensor meta, double temperature, OptionalTensor learned, OptionalTensor mass, bool normalize) {
  const SoftCall call(x, metric, meta);
  check_dense("out", out, ScalarType::Float, {call.batch, call.metas, call.channels});
  check_dense("mass_out", mass_out, ScalarType::Float, {call.batch, call.metas});
  with_float("x", x, [&](auto number) {
    using T = decltype(number);
    const SoftArguments<T> p = call.arguments<T>(temperature, learned, mass, normalize, lse, terms, scratch);
    call.describe_rows(p);
    launch(x, token_softmax<T>, call.batch * p.a.of.blocks, kSoftThreads, sizeof(SoftTiles<T, 3>), p);
    const FinishArguments<T> f{p, out.mutable_data_ptr<float>(), mass_out.mutable_data_ptr<float>(), nullptr};
    call.run_by_meta<false>(f, parts, part_sums, call.channels);
  });
}

// grad_temperature [B, blocks of 128 tokens]: parts of it. of_metas [3, B, M]; the gradient of the mass is terms[2]
void soft_backward(OptionalTensor grad_x, OptionalTensor grad_metric, OptionalTensor grad_meta, OptionalTensor grad_temperature,
                   Tensor scratch, Tensor terms, Tensor of_metas, OptionalTensor parts, OptionalTensor part_sums, Tensor grad_out,
                   Tensor grad_mass, Tensor x, Tensor metric, Tensor meta, double temperature, OptionalTensor learned, OptionalTensor mass,
                   bool normalize, Tensor out, Tensor mass_out, Tensor lse) {
  const SoftCall call(x, metric, meta);
  check_dense("out", out, ScalarType::Float, {call.batch, call.metas, call.channels});
  for (const auto& [name, t] : {std::pair("mass_out", &mass_out), std::pair("grad_mass", &grad_mass)})
    check_dense(name, *t, ScalarType::Float, {call.batch, call.metas});
  check_dense("of_metas", of_metas, ScalarType::Float, {3, call.batch, call.metas});
  for (const auto& [name, t, like] :
       {std::tuple("grad_x", &grad_x, &x), std::tuple("grad_metric", &grad_metric, &metric), std::tuple("grad_meta", &grad_meta, &meta)})
    if (*t) {
      check_rank(name, **t, 3);
      check_dtype(name, **t, x.scalar_type());
      for (int64_t dim = 0; dim < 3; ++dim) check_size(name, **t, dim, like->size(dim));
      check_contiguous(name, **t);
    }
  with_float("x", x, [&](auto number) {
    using T = decltype(number);
    const auto result = [](const OptionalTensor& t) { return t ? static_cast<T*>(t->mutable_data_ptr()) : nullptr; };
    SoftArguments<T> p = call.arguments<T>(temperature, learned, mass, normalize, lse, terms, scratch);
    p.grad_out = rows_of<T>("grad_out", grad_out, x, call.metas);
    p.divisor = of_metas.mutable_data_ptr<float>(), p.added = p.divisor + call.batch * call.metas;
    p.open = p.added + call.batch * call.metas;
    p.splits = 1;
    call.describe_rows(p);
    const MetaArguments<T> metas{p.grad_out.base,
                                 p.grad_out.sample,
                                 p.grad_out.row,
                                 out.const_data_ptr<float>(),
                                 mass_out.const_data_ptr<float>(),
                                 grad_mass.const_data_ptr<float>(),
                                 p.divisor,
                                 p.added,
                                 p.open,
                                 p.samples,
                                 p.metas,
                                 static_cast<int>(call.channels)};
    launch(x, meta_terms<T>, (call.batch * call.metas + kSoftWarps - 1) / kSoftWarps, kSoftThreads, 0, metas);
    launch(x, token_terms<T>, call.batch * p.a.of.blocks, kSoftThreads, sizeof(TermsShared<T>), p);
    if (grad_metric || grad_temperature) {
      SoftArguments<T> of_metric = p;
      of_metric.result = result(grad_metric);
      if (grad_temperature) {
        check_dense("grad_temperature", *grad_temperature, ScalarType::Float, {call.batch, p.a.of.blocks});
        of_metric.warmth = grad_temperature->mutable_data_ptr<float>();
      }
      call.run_gather<false, true>(of_metric, call.width);
    }
    if (grad_meta) {
      STD_TORCH_CHECK(parts && part_sums, "parts must be given for grad_meta");
      call.run_by_meta<true>(FinishArguments<T>{p, nullptr, nullptr, result(grad_meta)}, *parts, *part_sums, call.width);
    }
    if (grad_x) {
      SoftArguments<T> of_x = p;
      of_x.result = result(grad_x);
      call.run_gather<false, false>(of_x, call.channels);
    }
  });
}

}  // namespace

TOKENOPS_CUDA_OPERATORS(m) {
  m.impl("token_merge_cuda_soft", TOKENOPS_CUDA_OPERATOR(soft));
  m.impl("token_merge_cuda_soft_backward", TOKENOPS_CUDA_OPERATOR(soft_backward));
}

}  // namespace tokenops
