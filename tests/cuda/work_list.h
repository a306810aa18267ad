// The work lists of src/cuda/work.h made on the host, for the drivers of the products.
#pragma once
#include <algorithm>
#include <vector>

#include "cuda/work.h"

namespace machmoe::test {

// offsets [E + 1]. Entries past the last one are -1.
inline std::vector<int> work_list_of(const std::vector<int>& offsets, int64_t R_cap) {
  const size_t E = offsets.size() - 1;
  std::vector<int> words(cuda::work_bytes(R_cap, static_cast<int64_t>(E)) / sizeof(int), -1);
  const cuda::WorkList list = cuda::work_list(words.data(), static_cast<int64_t>(E));
  *list.header = {0, offsets.back(), 0};
  for (size_t e = 0; e < E; e++) {
    list.experts[e] = {static_cast<int>(e), offsets[e], offsets[e + 1]};
    list.header->experts += offsets[e + 1] > offsets[e];
  }
  std::stable_sort(list.experts, list.experts + E, [](const auto& a, const auto& b) { return a.row_end - a.row > b.row_end - b.row; });
  for (const int odd : {0, 1})
    for (size_t e = 0; e < E; e++) {
      if ((offsets[e + 1] - offsets[e] + cuda::kTileRows - 1) / cuda::kTileRows % 2 != odd) continue;
      for (int row = offsets[e]; row < offsets[e + 1]; row += cuda::kTileRows)
        list.tiles[list.header->tiles++] = {static_cast<int>(e), row, offsets[e + 1]};
    }
  return words;
}

}  // namespace machmoe::test
