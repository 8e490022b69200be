// The fake model in kernels of the host machine.
#include <signal.h>

#include "driver/machine.h"
extern "C" {
#include "../fake_model.h"
}

template <class T>
static T get(void** parameters, int index) {
  return *(T*)parameters[index];
}
static void fail() { raise(SIGSEGV); }

// state, hashes, tokens, positions, slots, starts, noise, rows, is_batch
static void append_rows(const Grid* grid, void** p) {
  auto tokens = get<const int*>(p, 2), positions = get<const int*>(p, 3), starts = get<const int*>(p, 5);
  auto hashes = get<uint64_t*>(p, 1);
  auto slots = get<const int64_t*>(p, 4);
  int rows = get<int>(p, 7), is_batch = get<int>(p, 8);
  if (grid->blocks[0] != 1 || grid->shared_bytes != 65536) fail();
  if (const float failing = get<const float*>(p, 6)[1]; failing != 0 && tokens[0] == (int)failing) fail();
  for (int t = 0; t < rows; ++t) {
    int row = is_batch ? t : 0;
    hashes[t] = append(get<char*>(p, 0) + slots[row] * 64, tokens[t], starts[row] + (is_batch ? 0 : t), positions + t, MAX_TOKENS);
  }
}

// bigram, noise, hashes, tokens, logits, first row, rows; a block has 64 logits
static void write_logits(const Grid* grid, void** p) {
  int64_t first = get<int64_t>(p, 5), rows = get<int>(p, 6);
  if ((int64_t)grid->blocks[0] != (rows * VOCAB + 63) / 64) fail();
  for (int64_t t = 0; t < rows; ++t)
    for (int64_t v = 0; v < VOCAB; ++v) {
      int token = get<const int*>(p, 3)[first + t];
      get<float*>(p, 4)[t * VOCAB + v] = logit(get<const float*>(p, 0), *get<const float*>(p, 1), get<const uint64_t*>(p, 2)[first + t], token, v);
    }
}

static const int append_sizes[] = {8, 8, 8, 8, 8, 8, 8, 4, 4}, logits_sizes[] = {8, 8, 8, 8, 8, 8, 4};
extern "C" __attribute__((visibility("default"))) const Kernel host_kernels[] = {
    {"append_kernel", 9, append_sizes, (void*)append_rows}, {"logits_kernel", 7, logits_sizes, (void*)write_logits}, {}};
