// Which items a cluster multiplies: it takes the next ones as it gets free. So all clusters work at neighbouring items however long theirs take, and
// find in L2 what the others read. Thread 0 of the cluster draws the numbers from a counter in global memory, turns ahead, and posts their places in
// shared memory of both CTAs for all producer threads.
#pragma once
#include "cuda/hopper/gemm/tile_order.h"
#include "cuda/hopper/ptx/ptx.cuh"
#include "cuda/work.h"

namespace machmoe::cuda::hopper {

template <class Order, class Entry>
struct TurnsParams {
  Order order;  // of the items
  const WorkHeader* header;
  const Entry* work;  // the list that the items come from
  uint32_t* counter;  // 0 before the launch and after it

  static TurnsParams make(const Order& order, const WorkHeader* header, const Entry* work, uint32_t* counter) {
    MACHMOE_CHECK(counter, "turns is null, expected a zero on the device: the clusters count in it");
    return {order, header, work, counter};
  }
};
using TileTurns = TurnsParams<TileOrder, WorkTile>;
using ExpertTurns = TurnsParams<ExpertOrder, WorkExpert>;

struct TurnSlots {
  // At the beginning nothing holds the drawing thread back: it may have filled all stages, with a tile each, and posted three turns ahead before another
  // thread has read the first turn.
  static constexpr int kSlots = 8;   // >= stages + 4
  static constexpr int kStatic = 3;  // first turns, whose items follow from the cluster's number: no draw has come back yet
  static constexpr int kBytes = 8 * kSlots;

  DEV static void init(uint32_t slots) {
    for (int i = 0; i < kSlots; i++) store_shared(slots + 8 * i, int64_t{1});
  }
};

template <class P>  // TileTurns or ExpertTurns
struct Turns : TurnSlots {
  const P& p;
  uint32_t slots;   // shared memory. Turn t lies in slot t % kSlots, marked with the parity of t / kSlots
  int tiles, rank;  // what the order counts its items from; of this CTA
  bool draws;
  int turn = 0, drawn = 0;

  // The slots of both CTAs are initialised.
  DEV Turns(const P& params, uint32_t shared, int tile_count, int cta, int tid)
      : p(params), slots(shared), tiles(tile_count), rank(cta), draws(cta == 0 && tid == 0) {
    if (draws) post(0);
  }
  // Every producer thread takes every turn.
  DEV TilePlace next() {
    if (draws) post(turn + 1);
    const uint32_t slot = slots + turn % kSlots * 8;
    int64_t place;
    do place = load_cluster(slot);
    while ((place & 1) != (turn / kSlots & 1));
    turn++;
    return {static_cast<int>(place >> 32), static_cast<int>(place) >> 1};
  }

 private:
  // Posts the place of turn t in both CTAs, and draws for the next one if there may be one. Each item of a turn >= kStatic - 1 draws one number, so the
  // last number is known, and the counter wraps around to 0 behind it. (A sum by atomicAdd the compiler may take over the lanes first, and then wait.)
  DEV void post(int t) {
    const int items = p.order.items(tiles), clusters = gridDim.x / 2, item = t < kStatic ? blockIdx.x / 2 + t * clusters : kStatic * clusters + drawn;
    TilePlace place{-1, 0};
    if (item < items) {
      if (t >= kStatic - 1) drawn = static_cast<int>(atomicInc(p.counter, items - (kStatic - 1) * clusters - 1));
      place = p.order.place(item, tiles);
    }
    const int64_t word = static_cast<int64_t>(place.pair) << 32 | (place.column << 1 | (t / kSlots & 1));
    for (int cta = 0; cta < 2; cta++) store_cluster(slots + t % kSlots * 8, cta, word);
  }
};

}  // namespace machmoe::cuda::hopper
