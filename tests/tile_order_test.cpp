// The order of a grouped GEMM's tiles: nothing left out, nothing twice, the pairs of a group side by side.
#include "cuda/hopper/gemm/tile_order.h"

#include <gmock/gmock.h>

#include <set>
#include <utility>
#include <vector>

namespace machmoe::cuda::hopper {
namespace {

std::vector<std::pair<int, int>> places(bool gathered, int columns, int tiles) {
  const TileOrder order = TileOrder::make(gathered, columns);
  std::vector<std::pair<int, int>> all;
  for (int item = 0; item < order.items(tiles); item++) {
    const TilePlace place = order.place(item, tiles);
    all.emplace_back(place.pair, place.column);
  }
  return all;
}

TEST(TileOrder, HasEveryPairOfRowTilesAndColumnOnce) {
  for (const int tiles : {0, 1, 2, 7, 64, 65, 333})
    for (const int columns : {1, 2, 3, 11, 12, 28})
      for (const bool gathered : {false, true}) {
        SCOPED_TRACE(testing::Message() << tiles << " tiles, " << columns << " columns, gathered " << gathered);
        const auto all = places(gathered, columns, tiles);
        const std::set<std::pair<int, int>> different(all.begin(), all.end());
        ASSERT_EQ(all.size(), static_cast<size_t>((tiles + 1) / 2 * columns));
        ASSERT_EQ(different.size(), all.size());
        for (const auto& [pair, column] : all) {
          ASSERT_LT(pair, (tiles + 1) / 2);
          ASSERT_LT(column, columns);
        }
      }
}

TEST(TileOrder, GoesThroughThePairsOfAGroupThenItsColumns) {
  using testing::ElementsAre;
  const auto at = [](int pair, int column) { return std::pair(pair, column); };
  EXPECT_THAT(places(true, 2, 5), ElementsAre(at(0, 0), at(0, 1), at(1, 0), at(1, 1), at(2, 0), at(2, 1)));
  EXPECT_THAT(places(false, 2, 5), ElementsAre(at(0, 0), at(1, 0), at(0, 1), at(1, 1), at(2, 0), at(2, 1)));
}

TEST(TileOrder, IsExactForEveryItemOfALargeProduct) {
  for (const int columns : {1, 3, 257}) {
    const TileOrder order = TileOrder::make(false, columns);
    const int tiles = 1 << 22, last = order.items(tiles) - 1;
    for (int item = last - 100000; item <= last; item++) {
      const TilePlace place = order.place(item, tiles);
      ASSERT_EQ((place.pair / 2 * columns + place.column) * 2 + place.pair % 2, item);
    }
  }
}

TEST(ExpertOrder, GoesThroughTheTilesOfAnExpertThenToTheNextExpert) {
  for (const int experts : {0, 1, 5, 128})
    for (const int tiles : {1, 3, 12, 252}) {
      const ExpertOrder order{tiles};
      ASSERT_EQ(order.items(experts), experts * tiles);
      int item = 0;
      for (int expert = 0; expert < experts; expert++)
        for (int tile = 0; tile < tiles; tile++, item++) {
          const TilePlace place = order.place(item, experts);
          ASSERT_EQ(place.pair, expert);
          ASSERT_EQ(place.column, tile);
        }
    }
}

}  // namespace
}  // namespace machmoe::cuda::hopper
