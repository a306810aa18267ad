// The order in which the clusters of a grouped GEMM visit their tiles: nothing left out, nothing twice, the work shared out evenly.
#include "cuda/hopper/gemm/tile_walk.h"

#include <gmock/gmock.h>

#include <algorithm>
#include <map>
#include <vector>

namespace machmoe::cuda::hopper {
namespace {

struct Grid {
  int tiles, columns, pairs, clusters;  // row tiles, column tiles, pairs of a group
};

// The items (pair of row tiles, column tile) of every cluster, in its order.
std::vector<std::vector<std::pair<int, int>>> visited(const Grid& g) {
  const WalkStep step = WalkStep::make(nullptr, nullptr, g.pairs, g.columns, g.clusters);
  std::vector<std::vector<std::pair<int, int>>> items(static_cast<size_t>(g.clusters));
  for (int c = 0; c < g.clusters; c++) {
    TileWalk at(step, c);
    for (at.settle(step, g.tiles); !at.ended(step, g.tiles); at.advance(step), at.settle(step, g.tiles))
      items[c].emplace_back(at.entry(step), at.rotated(step));
  }
  return items;
}

TEST(TileWalk, VisitsEveryPairOfRowTilesAndColumnOnce) {
  for (const int tiles : {0, 1, 2, 7, 64, 65, 333})
    for (const int columns : {1, 2, 3, 11, 12, 28})
      for (const int pairs : {1, 2, 8, 16})
        for (const int clusters : {1, 5, 16, 57, 66}) {
          std::map<std::pair<int, int>, int> times;
          for (const auto& items : visited({tiles, columns, pairs, clusters}))
            for (const auto& item : items) times[item]++;
          SCOPED_TRACE(testing::Message() << tiles << " tiles, " << columns << " columns, groups of " << pairs << ", " << clusters << " clusters");
          ASSERT_EQ(times.size(), static_cast<size_t>((tiles + 1) / 2 * columns));
          for (const auto& [item, n] : times) {
            ASSERT_EQ(n, 1);
            ASSERT_LT(item.first, (tiles + 1) / 2);
            ASSERT_LT(item.second, columns);
          }
        }
}

TEST(TileWalk, SharesTheItemsOutEvenly) {
  for (const int pairs : {1, 8}) {
    size_t least = ~size_t{0}, most = 0;
    for (const auto& items : visited({16 * pairs * 9, 28, pairs, 66})) {
      least = std::min(least, items.size());
      most = std::max(most, items.size());
    }
    EXPECT_LE(most - least, 1u) << "groups of " << pairs;
  }
}

// 2,880 columns are 11.25 tiles of 256: the narrow ones must not fall to the same clusters.
TEST(TileWalk, SpreadsTheLastColumnOverTheClusters) {
  int64_t least = INT64_MAX, most = 0;
  for (const auto& items : visited({1024, 12, 1, 66})) {
    const int64_t narrow = std::count_if(items.begin(), items.end(), [](const auto& item) { return item.second == 11; });
    least = std::min(least, narrow);
    most = std::max(most, narrow);
  }
  EXPECT_GT(least, 4);
  EXPECT_LT(most, 12);  // 7.8 on average
}

TEST(TileWalk, TakesPairsOfSmallExpertsInGroups) {
  EXPECT_EQ(group_pairs(false, 16384 * 8, 256), 8);   // DeepSeek-V3: Y, dX~
  EXPECT_EQ(group_pairs(true, 16384 * 8, 256), 1);    // A, dH
  EXPECT_EQ(group_pairs(false, 32768 * 10, 512), 8);  // Qwen3-Next-80B
  EXPECT_EQ(group_pairs(false, 24576 * 8, 128), 1);   // 7B-n256-K8
  EXPECT_EQ(group_pairs(false, 0, 64), 8);            // no rows: as for few
}

}  // namespace
}  // namespace machmoe::cuda::hopper
