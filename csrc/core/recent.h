// Values of the keys seen last, for functions that are pure and called again and again with the same arguments on the host.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace eightfold {

// A table with one place a key (by its hash): a newer key in its place drops the older. Not for several threads: make it
// thread_local.
template <size_t kWords, class Value, size_t kPlaces>
class Recent {
 public:
  using Key = std::array<uint64_t, kWords>;

  // The value of `key`, from the table or made now; valid until the next call.
  template <class Make>
  const Value& get(const Key& key, const Make& make) {
    Place& place = places_[hash(key) % kPlaces];
    if (!place.taken || place.key != key) {
      place.value = make();
      place.key = key;
      place.taken = true;
    }
    return place.value;
  }

 private:
  struct Place {
    Value value;
    Key key;
    bool taken;
  };

  static size_t hash(const Key& key) {
    uint64_t h = 0;
    for (uint64_t word : key) {
      h = (h ^ word) * 0x9E3779B97F4A7C15u;
      h ^= h >> 29;
    }
    return h;
  }

  std::array<Place, kPlaces> places_{};
};

}  // namespace eightfold
