// A machine that runs kernels written for the host: each is one function, called once for a launch.
//
// For tests of the runtime, which need no CUDA text: memory that is not mapped cannot be touched, and that is all it checks.
#include <dlfcn.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <string>

#include "machine.h"

static const size_t PAGE = 4096, ALIGNMENT = 2 << 20;
static std::string findings_;
static sigjmp_buf escape_;
static volatile sig_atomic_t is_running_;

static size_t pages(size_t bytes) { return (bytes + PAGE - 1) / PAGE * PAGE; }

void* machine_reserve(size_t bytes) {
  void* start = mmap(nullptr, pages(bytes) + 2 * ALIGNMENT, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (start == MAP_FAILED) return nullptr;
  return (void*)(((uintptr_t)start + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);  // what is left over guards the end
}
void machine_map(void* address, size_t bytes) {
  mprotect(address, pages(bytes), PROT_READ | PROT_WRITE);
  memset(address, 0xff, pages(bytes));  // NaN
}
void machine_unmap(void* address, size_t bytes) {
  mmap(address, pages(bytes), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
}
void machine_written(void*, size_t) {}

bool machine_is_image(void* library) { return dlsym(library, "host_kernels") != nullptr; }
const Kernel* machine_find(void* library, const char* name) {
  auto kernel = (const Kernel*)dlsym(library, "host_kernels");
  while (kernel->name && strcmp(kernel->name, name)) ++kernel;
  return kernel->name ? kernel : nullptr;
}

static void leave(int) {
  if (!is_running_) {
    signal(SIGSEGV, SIG_DFL);
    raise(SIGSEGV);
  }
  siglongjmp(escape_, 1);
}
int machine_launch(void*, const Kernel& kernel, const Grid& grid, void** parameters) {
  struct sigaction now = {}, before;
  now.sa_handler = leave;
  sigaction(SIGSEGV, &now, &before);
  int failed = sigsetjmp(escape_, 1);
  is_running_ = 1;
  if (!failed) ((void (*)(const Grid*, void**))kernel.code)(&grid, parameters);
  is_running_ = 0;
  sigaction(SIGSEGV, &before, nullptr);
  if (failed) findings_ += std::string("out of bounds: kernel ") + kernel.name + "\n";
  return failed;
}
const char* machine_findings() { return findings_.c_str(); }
void machine_forget_findings() { findings_.clear(); }
