/* What fake models of every kind of machine compute.
 *
 * Every token stirs a hash (in the delta state) and is written to the key and value caches at its place.
 * logits[v] = bigram[token][v] + noise * u(hash, position, checksum of all used cache cells, v), so a wrong
 * state, position, length or cache cell changes the noise, and the bigram table scripts what is said.
 */
#include <stdint.h>

static uint64_t mix(uint64_t x) {
  x ^= x >> 30; x *= 0xBF58476D1CE4E5B9ull; x ^= x >> 27; x *= 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

/* Append one token; return the hash that its logits are made of. */
static uint64_t append(char *region, int token, int place, const int *positions, int stride) {
  uint64_t *hash = (uint64_t *)(region + DELTA);
  float *conv = (float *)(region + CONV), *keys = (float *)(region + KEYS), *values = (float *)(region + VALUES);
  *hash = mix(*hash ^ mix(token + 1) ^ mix(1000003ull * positions[0] + 7ull * positions[stride] + positions[2 * stride]));
  conv[0] += 1.0f;
  for (int d = 0; d < 32; d++) {
    keys[(place / 32) * 32 * 32 + d * 32 + place % 32] = token + d;
    values[place * 32 + d] = token * 2 + d;
  }
  uint64_t sum = conv[0] == place + 1 ? 0 : 99;
  for (int64_t p = 0; p <= place; p++) {
    uint64_t key = (uint64_t)keys[(p / 32) * 32 * 32 + 5 * 32 + p % 32], value = (uint64_t)values[p * 32 + 3];
    sum = sum * 31 + key * 131 + value;
  }
  return mix(*hash ^ sum);
}

/* Return one logit after a token whose append has returned this hash. */
static float logit(const float *bigram, float noise, uint64_t hash, int token, int64_t v) {
  return bigram[(int64_t)token * VOCAB + v] + noise * (float)(mix(hash + v) >> 40) / 16777216.0f;
}
