#include <algorithm>
#include <vector>

#include "core/threads.h"
#include "optim/adamw_dre.h"
#include "optim/dre_group_cpu.h"
#include "optim/elements_cpu.h"

namespace eightfold {
namespace {

constexpr int64_t kGrain = 64;  // groups a thread takes at least
static_assert(kDreGroup <= kRandomSpan);

struct Work {
  const AdamwTensor* tensor;
  AdamwConstants constants;
  AdamwScalars scalars;
  uint32_t step;
  bool stochastic_states;
  PhiloxKeys keys;
  int64_t first_group, groups_per_row;
};

EF_HD void update(const Work& work, int count, const float* g, float* p, float* m, float* v) {
  const AdamwConstants c = work.constants;
  const AdamwScalars s = work.scalars;
  for (int i = 0; i < count; ++i) {
    float grad = g[i] * s.grad_scale;
    m[i] = std::fma(c.beta1, m[i], c.one_minus_beta1 * grad);
    v[i] = std::fma(c.beta2, v[i], (c.one_minus_beta2 * grad) * grad);
    float denominator = std::fma(std::sqrt(v[i]), s.root_scale, c.eps);
    p[i] = std::fma(-s.step_size, m[i] / denominator, p[i] * s.decay);
  }
}

EF_HD void store_param(const Work& work, int64_t begin, int count, const float* p) {
  const AdamwTensor& t = *work.tensor;
  if (t.master) std::copy(p, p + count, t.master + begin);
  if (t.param_type == DType::f32) {
    std::copy(p, p + count, static_cast<float*>(t.param) + begin);
    return;
  }
  uint16_t* out = static_cast<uint16_t*>(t.param) + begin;
  if (t.master) {
    for (int i = 0; i < count; ++i) out[i] = float_to_bf16(p[i]);
  } else {
    store_stochastic(out, count, p, static_cast<uint64_t>(t.offset + begin), work.step, work.keys);
  }
}

EF_HD void encode_states(const Work& work, int64_t group, int64_t begin, int count, const float* m, const float* v) {
  const AdamwTensor& t = *work.tensor;
  DreScale m_scale, v_scale;
  if (work.stochastic_states) {
    uint32_t random[kDreGroup];
    fill_random<1>(random, count, static_cast<uint64_t>(t.offset + begin), work.step, work.keys);
    m_scale = encode_group<true>(m, count, t.m_codes + begin, random, 0);
    v_scale = encode_group<true>(v, count, t.v_codes + begin, random, 16);
  } else {
    m_scale = encode_group<false>(m, count, t.m_codes + begin, nullptr, 0);
    v_scale = encode_group<false>(v, count, t.v_codes + begin, nullptr, 0);
  }
  t.m_maxima[group] = m_scale.maximum, t.m_exponents[group] = m_scale.exponent;
  t.v_maxima[group] = v_scale.maximum, t.v_exponents[group] = v_scale.exponent;
}

EF_CPU_CLONES void step_groups(const Work& work, int64_t first, int64_t last) {
  const AdamwTensor& t = *work.tensor;
  float g[kDreGroup], p[kDreGroup], m[kDreGroup], v[kDreGroup];
  for (int64_t group = first; group < last; ++group) {
    int64_t row = group / work.groups_per_row, col = (group - row * work.groups_per_row) * kDreGroup;
    int64_t begin = row * t.row_length + col;
    int count = static_cast<int>(std::min<int64_t>(kDreGroup, t.row_length - col));
    load(t.grad, t.grad_type, begin, count, g);
    if (t.master)
      load(t.master, DType::f32, begin, count, p);
    else
      load(t.param, t.param_type, begin, count, p);
    decode_group(t.m_codes + begin, count, {t.m_maxima[group], t.m_exponents[group]}, m);
    decode_group(t.v_codes + begin, count, {t.v_maxima[group], t.v_exponents[group]}, v);
    update(work, count, g, p, m, v);
    store_param(work, begin, count, p);
    encode_states(work, group, begin, count, m, v);
  }
}

void step_range(const std::vector<Work>& works, int64_t begin, int64_t end) {
  auto after = std::upper_bound(works.begin(), works.end(), begin, [](int64_t group, const Work& w) { return group < w.first_group; });
  for (auto work = after - 1; work != works.end() && work->first_group < end; ++work) {
    int64_t groups = work->tensor->rows * work->groups_per_row;
    int64_t first = std::max<int64_t>(begin - work->first_group, 0), last = std::min(end - work->first_group, groups);
    step_groups(*work, first, last);
  }
}

}  // namespace

void adamw_dre_cpu(const AdamwTensor* tensors, int64_t count, const AdamwOptions& o) {
  const AdamwConstants constants = adamw_constants(o);
  const float grad_scale = o.grad_scale ? *o.grad_scale : 1.0f;
  std::vector<Work> works;
  works.reserve(count);
  int64_t groups = 0;
  for (int64_t i = 0; i < count; ++i) {
    const AdamwTensor& t = tensors[i];
    int64_t groups_per_row = (t.row_length + kDreGroup - 1) / kDreGroup;
    works.push_back({&t, constants, adamw_scalars(constants, *o.lr, *t.step, grad_scale), static_cast<uint32_t>(*t.step),
                     o.stochastic_states, PhiloxKeys(o.seed), groups, groups_per_row});
    groups += t.rows * groups_per_row;
  }
  parallel_for(groups, kGrain, [&](int64_t begin, int64_t end) { step_range(works, begin, end); });
}

}  // namespace eightfold
