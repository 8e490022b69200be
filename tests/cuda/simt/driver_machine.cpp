// The machine behind the emulated driver (tests/cuda/driver/machine.h): memory that can be mapped
// piece by piece, and launches of the kernels of an image.
#include "simt.cpp"

#include <dlfcn.h>

#include "../driver/machine.h"

static const size_t ALIGNMENT = 2 << 20;
static std::map<const SimtKernel*, Kernel> found_;
static std::string findings_;

static size_t pages(size_t bytes) { return (bytes + PAGE - 1) / PAGE * PAGE; }

void* machine_reserve(size_t bytes) {
  ready();
  global_used = (global_used + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
  if (global_used + pages(bytes) + PAGE > GLOBAL_BYTES) return nullptr;
  char* start = global_base + global_used;
  global_used += pages(bytes) + PAGE;  // a page of no man's land behind each
  return start;
}
void machine_map(void* address, size_t bytes) {
  allocations[(up)address] = {(char*)address, bytes, false, false};
  memset(page_kind + ((char*)address - global_base) / PAGE, 1, pages(bytes) / PAGE);
}
void machine_unmap(void* address, size_t bytes) {
  allocations.erase((up)address);
  up first = (char*)address - global_base;
  memset(page_kind + first / PAGE, 0, pages(bytes) / PAGE);
  madvise(address, pages(bytes), MADV_DONTNEED);
  madvise(global_cells + first / 4, pages(bytes) / 4 * sizeof(Cell),
          MADV_DONTNEED);  // whole pages: a page has 1,024 cells
}
void machine_written(void* address, size_t bytes) {
  if (bytes) simt_mark(address, bytes);
}

bool machine_is_image(void* library) { return dlsym(library, "simt_module") != nullptr; }
const Kernel* machine_find(void* library, const char* name) {
  auto module = (const SimtModule*)dlsym(library, "simt_module");
  for (int i = 0; i < module->kernels; ++i) {
    const SimtKernel& kernel = module->kernel[i];
    if (!strcmp(kernel.name, name))
      return &(found_[&kernel] = {kernel.name, kernel.parameters, kernel.sizes, &kernel});
  }
  return nullptr;
}

int machine_launch(void* library, const Kernel& kernel, const Grid& grid, void** parameters) {
  auto module = (const SimtModule*)dlsym(library, "simt_module");
  dim3 blocks{grid.blocks[0], grid.blocks[1], grid.blocks[2]};
  dim3 threads{grid.threads[0], grid.threads[1], grid.threads[2]};
  simt_clear();
  int failed = simt_launch(module, (const SimtKernel*)kernel.code, blocks, threads,
                           grid.shared_bytes, parameters);
  findings_ += reports;
  return failed || !reports.empty();
}
const char* machine_findings() { return findings_.c_str(); }
void machine_forget_findings() { findings_.clear(); }
