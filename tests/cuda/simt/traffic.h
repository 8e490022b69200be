// What a device would move, where that is asked for: 32-byte sectors of global memory for each
// access of a warp, and how many words of one bank an access to shared memory needs.
//
// Threads run one after another, so an access of a warp is put together: the nth time that its
// lanes come to a place in the code. Where lanes go round a loop unequally often that is only
// nearly so.
#pragma once

struct Traffic {
  u64 asked, moved, accesses;  // distinct bytes, bytes of sectors, accesses of a warp
  u64 ways;                    // the most words of one bank at once
};
struct WarpAccess {
  int warp;
  up pc;
  u32 number;
  bool operator<(const WarpAccess& o) const {
    return std::tie(warp, pc, number) < std::tie(o.warp, o.pc, o.number);
  }
};
static bool counts_traffic;
static std::map<WarpAccess, std::vector<std::pair<up, u32>>> accesses_;  // of a block
static std::map<std::pair<int, up>, u32> visits_;                        // of a thread to a place
static std::map<up, Traffic> traffic_;  // by the start of the buffer; 0: shared memory

static bool is_device_memory(up p) {
  bool is_static = module_->shared_begin && p - (up)module_->shared_begin < STATIC_BYTES;
  return p - (up)global_base < GLOBAL_BYTES || p - (up)dynamic_shared < DYNAMIC_BYTES || is_static;
}
static void count_access(const Thread& t, up p, size_t n, up pc) {
  if (!is_device_memory(p)) return;  // the machine's own, as threadIdx
  u32 number = visits_[{t.number, pc}]++;
  accesses_[{t.warp, pc, number}].push_back({p, (u32)n});
}
static up buffer_of(up p) {
  auto it = allocations.upper_bound(p);
  return p - (up)global_base >= GLOBAL_BYTES || it == allocations.begin()
             ? 0
             : (up)std::prev(it)->second.begin;
}
static void count_shared(Traffic& total, const std::vector<std::pair<up, u32>>& lanes) {
  std::map<u32, std::vector<up>> banks;
  for (auto& [p, n] : lanes)
    for (up word = p / 4; word <= (p + n - 1) / 4; ++word) {
      auto& held = banks[word % 32];
      if (std::find(held.begin(), held.end(), word) == held.end()) held.push_back(word);
    }
  // 8 and 16 bytes of a lane take two and four turns anyway.
  size_t turns = std::max<size_t>(1, lanes[0].second / 4);
  for (auto& [bank, words] : banks)
    total.ways = std::max<u64>(total.ways, (words.size() + turns - 1) / turns);
}
static void end_block_traffic() {
  for (auto& [key, lanes] : accesses_) {
    up buffer = buffer_of(lanes[0].first);
    Traffic& total = traffic_[buffer];
    total.accesses++;
    if (!buffer) {
      count_shared(total, lanes);
      continue;
    }
    std::map<up, u32> sectors;  // 32-byte sector -> mask of its bytes
    for (auto& [p, n] : lanes)
      for (up byte = p; byte < p + n; ++byte) sectors[byte / 32] |= 1u << byte % 32;
    for (auto& [sector, mask] : sectors) {
      total.asked += __builtin_popcount(mask);
      total.moved += 32;
    }
  }
  accesses_.clear();
  visits_.clear();
}
extern "C" void simt_count_traffic(int on) {
  counts_traffic = on;
  traffic_.clear();
}
extern "C" void simt_traffic(const void* buffer, u64* out) {
  Traffic& found = traffic_[(up)buffer];
  memcpy(out, &found, sizeof found);
}
