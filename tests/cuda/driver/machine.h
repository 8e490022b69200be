// What the emulated driver asks of the machine that has the memory and runs the kernels of an image.
#pragma once
#include <cstddef>

struct Grid {
  unsigned blocks[3], threads[3];
  size_t shared_bytes;  // dynamic
};

// A kernel of an image: how many parameters it takes, and the bytes of each.
struct Kernel {
  const char* name;
  int parameters;
  const int* sizes;
  const void* code;
};

// Memory. Addresses are never used again, so that a use after the end is seen.
void* machine_reserve(size_t bytes);           // addresses without memory
void machine_map(void* address, size_t bytes);  // memory that nobody has written yet
void machine_unmap(void* address, size_t bytes);
void machine_written(void* address, size_t bytes);  // by a copy

// Images. `library` is what dlopen returned; null if there are no kernels of this machine in it.
const Kernel* machine_find(void* library, const char* name);
bool machine_is_image(void* library);

// Run a kernel to its end. Returns 0, or 1 if something was found, which `machine_findings` tells from then on.
int machine_launch(void* library, const Kernel& kernel, const Grid& grid, void** parameters);
const char* machine_findings();
void machine_forget_findings();
