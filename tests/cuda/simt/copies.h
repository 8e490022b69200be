// Shared memory, asynchronous copies.
#pragma once
extern "C" void* simt_dynamic_shared(size_t) { return dynamic_shared; }
extern "C" u32 simt_to_shared(const void* p) {
  up d = (up)p - (up)dynamic_shared;
  if (d < DYNAMIC_BYTES) return SHARED_WINDOW + (u32)d;
  up s = (up)p - (up)module_->shared_begin;
  if (module_->shared_begin && s < STATIC_BYTES) return STATIC_WINDOW + (u32)s;
  report("out of bounds", (up)RA, "address taken as shared memory is none");
  fatal();
  return 0;
}
extern "C" void* simt_from_shared(u32 a) {
  if (a >= STATIC_WINDOW) return module_->shared_begin + (a - STATIC_WINDOW);
  if (a < SHARED_WINDOW || a >= SHARED_WINDOW + DYNAMIC_BYTES) {
    report("out of bounds", (up)RA, "shared address %u", a);
    fatal();
  }
  return dynamic_shared + (a - SHARED_WINDOW);
}
static Cell* cell_of_shared(up p) {
  up d = p - (up)dynamic_shared;
  return d < DYNAMIC_BYTES ? dynamic_cells + d / 4
                           : static_cells + (p - (up)module_->shared_begin) / 4;
}
static void set_flight(char* p, size_t n, bool on) {
  Cell* c = cell_of_shared((up)p);
  for (size_t i = 0; i < n / 4; ++i) c[i].flight = on ? 15 : 0;
}
static void land(Thread& t, const Copy& c) {
  char* d = (char*)simt_from_shared(c.dst);
  set_flight(d, c.bytes, false);
  memcpy(d, c.src, c.src_bytes);
  memset(d + c.src_bytes, 0, c.bytes - c.src_bytes);
  access_as(t, (up)d, c.bytes, WRITE, 0, true);
}
extern "C" void simt_async_copy(u32 dst, const void* src, unsigned bytes, unsigned src_bytes) {
  Thread& t = current();
  char* d = (char*)simt_from_shared(dst);
  if ((up)src % bytes)
    report("misaligned", (up)RA, "cp.async of %u bytes from an unaligned address", bytes);
  if (src_bytes) access_as(t, (up)src, src_bytes, READ, (up)RA, false);
  access_as(t, (up)d, bytes, WRITE, (up)RA, true);  // others must have done with it
  set_flight(d, bytes, true);
  t.copies.push_back({dst, (const char*)src, bytes, src_bytes, t.copy_group});
}
extern "C" void simt_async_commit() { current().copy_group++; }
extern "C" void simt_async_wait(int left) {
  Thread& t = current();
  int done = t.copy_group - left;
  auto& c = t.copies;
  size_t i = 0;
  for (; i < c.size() && c[i].group < done; ++i) land(t, c[i]);
  c.erase(c.begin(), c.begin() + i);
}
