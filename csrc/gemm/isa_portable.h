// Four lanes, which every 64-bit processor has; products and sums are rounded separately.
#pragma once

#include <cstdint>

namespace eightfold {
namespace {

struct Portable {
  typedef float Vec __attribute__((vector_size(16), aligned(4), may_alias));
  static constexpr int kLanes = 4, kVecs = 4, kMr = 2;
  static constexpr int64_t kDepth = 4, kRowBlock = 64;

  static Vec zero() { return Vec{}; }
  static Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
  static void store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }
  static Vec broadcast(const float* p) { return Vec{*p, *p, *p, *p}; }
  static Vec add(Vec a, Vec b) { return a + b; }
  static Vec multiply_add(Vec a, Vec b, Vec c) { return a * b + c; }
};

}  // namespace
}  // namespace eightfold
