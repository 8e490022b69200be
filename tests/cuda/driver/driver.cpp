// libcuda.so.1 for a machine without a GPU: the driver calls of the runtime, over host memory and kernels compiled for the host.
//
// It is as late and as strict as it may be. Streams work only when somebody waits for them, so that a buffer that is used too
// early holds the wrong bytes; a thread without a current context, memory that is not mapped, a launch out of its limits and
// waiting for a stream that is captured are refused; a finding of the machine is a fault, after which every call fails.
//
// Environment: FAKECUDA_DEVICES (1), FAKECUDA_CC (0.0: no hardware), FAKECUDA_VERSION (13000), FAKECUDA_MEMORY (bytes),
// FAKECUDA_GRANULARITY (65536), FAKECUDA_FAIL=call:n:error (the nth call, 0: every one, fails).
#include <dlfcn.h>
#include <elf.h>
#include <sys/mman.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "machine.h"

#define VISIBLE extern "C" __attribute__((visibility("default")))
#define API VISIBLE int

enum Code {
  OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, NO_DEVICE = 100, INVALID_DEVICE = 101,
  INVALID_IMAGE = 200, INVALID_CONTEXT = 201, NO_BINARY = 209, INVALID_HANDLE = 400, NOT_FOUND = 500, NOT_READY = 600,
  ILLEGAL_ADDRESS = 700, CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALIDATED = 901, UNKNOWN = 999,
};
typedef unsigned long long Address;
typedef std::function<int()> Work;
const int ATTRIBUTE_MAJOR = 75, ATTRIBUTE_MINOR = 76, ATTRIBUTE_SHARED = 97, ATTRIBUTE_VIRTUAL_MEMORY = 102;
const int FUNCTION_SHARED = 8, UNASKED_SHARED = 48 << 10, MOST_SHARED = 232448;

struct Graph { std::vector<Work> nodes; };
struct Stream { std::deque<Work> queue; std::unique_ptr<Graph> capture; bool is_invalid = false; };
struct Event { bool is_done = false; std::chrono::steady_clock::time_point time; };
struct Image { void* library; int file; std::map<std::string, struct Function*> functions; };
struct Function { Image* image; const Kernel* kernel; int shared_limit = UNASKED_SHARED; bool is_loaded = false; };
struct Physical { size_t bytes; bool is_mapped; };

static std::recursive_mutex mutex_;
static thread_local std::vector<void*> current_;
static int contexts_, sticky_;
static pid_t process_;
static size_t used_, next_handle_ = 1;
static std::map<char*, size_t> mapped_, reserved_, pinned_, allocated_;
static std::map<Address, Physical> physical_;
static std::map<char*, Address> behind_;
static std::set<Stream*> streams_;
static std::map<std::string, long> calls_, live_;
static std::string failure_, text_;

static long option(const char* name, long otherwise) {
  const char* value = getenv(name);
  return value ? atol(value) : otherwise;
}

// Every call: count it, fail if it was asked to, and know whether the driver was initialised in this process.
static int enter(const char* name) {
  long number = ++calls_[name];
  const char* asked = failure_.empty() ? getenv("FAKECUDA_FAIL") : failure_.c_str();
  char wanted[64];
  long at;
  int error;
  if (asked && sscanf(asked, "%63[^:]:%ld:%d", wanted, &at, &error) == 3 && !strcmp(wanted, name) && (!at || at == number)) {
    if (error >= ILLEGAL_ADDRESS && error < CAPTURE_UNSUPPORTED) sticky_ = error;
    return error;
  }
  return process_ == getpid() ? OK : NOT_INITIALIZED;
}
#define ENTER std::lock_guard<std::recursive_mutex> guard(mutex_); if (int error = enter(__func__)) return error
#define CONTEXT ENTER; if (sticky_) return sticky_; if (current_.empty() || !contexts_) return INVALID_CONTEXT

// --- memory ---
static bool holds(const void* address, size_t bytes) {
  const char* at = (const char*)address;
  for (const char* end = at + bytes; at < end;) {
    auto next = mapped_.upper_bound((char*)at);
    if (next == mapped_.begin()) return false;
    auto [start, size] = *std::prev(next);
    if (at >= start + size) return false;
    at = start + size;
  }
  return true;
}
static bool is_pinned(const void* address, size_t bytes) {
  auto next = pinned_.upper_bound((char*)address);
  if (next == pinned_.begin()) return false;
  auto [start, size] = *std::prev(next);
  return (const char*)address + bytes <= start + size;
}
static bool take(size_t bytes) {
  if (used_ + bytes > (size_t)option("FAKECUDA_MEMORY", 4L << 30)) return false;
  used_ += bytes;
  return true;
}
static size_t granularity() { return option("FAKECUDA_GRANULARITY", 64 << 10); }

// --- streams ---
static int run(Work& work) {
  if (sticky_) return sticky_;
  return sticky_ = work();
}
static int drain(Stream* stream) {
  while (!stream->queue.empty()) {
    Work work = std::move(stream->queue.front());
    stream->queue.pop_front();
    run(work);
  }
  return sticky_;
}
static int push(Stream* stream, Work work) {
  if (!streams_.count(stream)) return INVALID_HANDLE;
  if (stream->capture) stream->capture->nodes.push_back(std::move(work));
  else stream->queue.push_back(std::move(work));
  return OK;
}

VISIBLE int cuInit(unsigned) {
  std::lock_guard<std::recursive_mutex> guard(mutex_);
  if (process_ && process_ != getpid()) return NOT_INITIALIZED;  // a child of a process that had used the driver
  int error = enter("cuInit");
  if (error && error != NOT_INITIALIZED) return error;
  if (option("FAKECUDA_DEVICES", 1) < 1) return NO_DEVICE;
  Dl_info self;
  dladdr(&process_, &self);  // of this library, though another one may have the same functions
  dlopen(self.dli_fname, RTLD_NOLOAD | RTLD_GLOBAL | RTLD_NOW);  // images find the machine here
  process_ = getpid();
  return OK;
}
API cuDriverGetVersion(int* version) { *version = option("FAKECUDA_VERSION", 13000); return OK; }
API cuGetErrorName(int code, const char** name) {
  static const std::map<int, const char*> names = {
      {1, "INVALID_VALUE"}, {2, "OUT_OF_MEMORY"}, {3, "NOT_INITIALIZED"}, {100, "NO_DEVICE"}, {101, "INVALID_DEVICE"},
      {200, "INVALID_IMAGE"}, {201, "INVALID_CONTEXT"}, {209, "NO_BINARY_FOR_GPU"}, {400, "INVALID_HANDLE"}, {500, "NOT_FOUND"},
      {600, "NOT_READY"}, {700, "ILLEGAL_ADDRESS"}, {719, "LAUNCH_FAILED"}, {900, "STREAM_CAPTURE_UNSUPPORTED"}, {901, "STREAM_CAPTURE_INVALIDATED"}};
  static std::map<int, std::string> full;
  std::lock_guard<std::recursive_mutex> guard(mutex_);
  auto found = names.find(code);
  *name = (full[code] = std::string("CUDA_ERROR_") + (found == names.end() ? "UNKNOWN" : found->second)).c_str();
  return OK;
}

// --- devices and contexts ---
API cuDeviceGetCount(int* count) { ENTER; *count = option("FAKECUDA_DEVICES", 1); return OK; }
API cuDeviceGet(int* device, int ordinal) {
  ENTER;
  if (ordinal < 0 || ordinal >= option("FAKECUDA_DEVICES", 1)) return INVALID_DEVICE;
  *device = ordinal;
  return OK;
}
API cuDeviceGetName(char* name, int size, int) { ENTER; snprintf(name, size, "emulated device"); return OK; }
API cuDeviceGetUuid_v2(char* uuid, int device) { ENTER; memset(uuid, 0xe0 + device, 16); return OK; }
API cuDeviceGetAttribute(int* value, int attribute, int) {
  ENTER;
  int major = 0, minor = 0;
  if (const char* text = getenv("FAKECUDA_CC")) sscanf(text, "%d.%d", &major, &minor);
  switch (attribute) {
    case ATTRIBUTE_MAJOR: *value = major; break;
    case ATTRIBUTE_MINOR: *value = minor; break;
    case ATTRIBUTE_SHARED: *value = option("FAKECUDA_SHARED", MOST_SHARED); break;
    case ATTRIBUTE_VIRTUAL_MEMORY: *value = option("FAKECUDA_VIRTUAL_MEMORY", 1); break;
    default: return INVALID_VALUE;
  }
  return OK;
}
API cuDevicePrimaryCtxRetain(void** context, int device) { ENTER; ++contexts_; ++live_["context"]; *context = (void*)(uintptr_t)(device + 1); return OK; }
API cuDevicePrimaryCtxRelease_v2(int) { ENTER; if (!contexts_) return INVALID_CONTEXT; --contexts_; --live_["context"]; return OK; }
API cuCtxPushCurrent_v2(void* context) { ENTER; if (!context || !contexts_) return INVALID_CONTEXT; current_.push_back(context); return OK; }
API cuCtxPopCurrent_v2(void** context) { ENTER; if (current_.empty()) return INVALID_CONTEXT; *context = current_.back(); current_.pop_back(); return OK; }

// --- memory ---
API cuMemGetInfo_v2(size_t* left, size_t* total) { CONTEXT; *total = option("FAKECUDA_MEMORY", 4L << 30); *left = *total - used_; return OK; }
API cuMemAlloc_v2(Address* address, size_t bytes) {
  CONTEXT;
  if (!bytes) return INVALID_VALUE;
  if (!take(bytes)) return OUT_OF_MEMORY;
  char* start = (char*)machine_reserve(bytes);
  machine_map(start, bytes);
  mapped_[start] = allocated_[start] = bytes;
  ++live_["memory"];
  *address = (Address)start;
  return OK;
}
API cuMemFree_v2(Address address) {
  CONTEXT;
  auto found = allocated_.find((char*)address);
  if (found == allocated_.end()) return INVALID_VALUE;
  for (Stream* stream : streams_) drain(stream);  // freeing waits for the device
  machine_unmap(found->first, found->second);
  used_ -= found->second;
  mapped_.erase(found->first);
  allocated_.erase(found);
  --live_["memory"];
  return OK;
}
API cuMemHostAlloc(void** address, size_t bytes, unsigned) {
  CONTEXT;
  if (!bytes) return INVALID_VALUE;
  *address = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
  memset(*address, 0xee, bytes);
  pinned_[(char*)*address] = bytes;
  ++live_["pinned"];
  return OK;
}
API cuMemFreeHost(void* address) { CONTEXT; if (!pinned_.erase((char*)address)) return INVALID_VALUE; free(address); --live_["pinned"]; return OK; }
API cuMemGetAllocationGranularity(size_t* bytes, const void*, int) { ENTER; *bytes = granularity(); return OK; }
API cuMemAddressReserve(Address* address, size_t bytes, size_t, Address, unsigned long long) {
  CONTEXT;
  if (!bytes || bytes % granularity()) return INVALID_VALUE;
  char* start = (char*)machine_reserve(bytes);
  if (!start) return OUT_OF_MEMORY;
  reserved_[start] = bytes;
  ++live_["address"];
  *address = (Address)start;
  return OK;
}
API cuMemAddressFree(Address address, size_t bytes) {
  CONTEXT;
  auto found = reserved_.find((char*)address);
  if (found == reserved_.end() || found->second != bytes) return INVALID_VALUE;
  auto next = mapped_.lower_bound((char*)address);
  if (next != mapped_.end() && next->first < (char*)address + bytes) return INVALID_VALUE;  // memory is still there
  reserved_.erase(found);
  --live_["address"];
  return OK;
}
API cuMemCreate(Address* handle, size_t bytes, const void*, unsigned long long) {
  CONTEXT;
  if (!bytes || bytes % granularity()) return INVALID_VALUE;
  if (!take(bytes)) return OUT_OF_MEMORY;
  *handle = next_handle_++;
  physical_[*handle] = {bytes, false};
  ++live_["physical"];
  return OK;
}
static void drop(Address handle) {  // memory goes when it is neither mapped nor held
  auto found = physical_.find(handle);
  if (found == physical_.end()) return;
  used_ -= found->second.bytes;
  physical_.erase(found);
  --live_["physical"];
}
API cuMemRelease(Address handle) { CONTEXT; auto found = physical_.find(handle); if (found == physical_.end() || found->second.is_mapped) return INVALID_VALUE; drop(handle); return OK; }
API cuMemMap(Address address, size_t bytes, size_t offset, Address handle, unsigned long long) {
  CONTEXT;
  auto found = physical_.find(handle);
  auto range = reserved_.upper_bound((char*)address);
  if (found == physical_.end() || found->second.bytes != bytes || offset || address % granularity() || range == reserved_.begin()) return INVALID_VALUE;
  auto [start, size] = *std::prev(range);
  auto next = mapped_.lower_bound((char*)address);
  bool is_taken = next != mapped_.end() && next->first < (char*)address + bytes;
  if ((char*)address + bytes > start + size || is_taken) return INVALID_VALUE;
  found->second.is_mapped = true;
  behind_[(char*)address] = handle;
  return OK;
}
API cuMemSetAccess(Address address, size_t bytes, const void*, size_t count) {
  CONTEXT;
  auto found = behind_.find((char*)address);
  if (found == behind_.end() || physical_[found->second].bytes != bytes || count != 1) return INVALID_VALUE;
  machine_map((void*)address, bytes);
  mapped_[(char*)address] = bytes;
  return OK;
}
API cuMemUnmap(Address address, size_t bytes) {
  CONTEXT;
  auto found = behind_.find((char*)address);
  if (found == behind_.end() || physical_[found->second].bytes != bytes) return INVALID_VALUE;
  if (mapped_.erase((char*)address)) machine_unmap((void*)address, bytes);
  physical_[found->second].is_mapped = false;
  behind_.erase(found);
  return OK;
}

// --- copies: from and to pinned memory they happen late, other memory is copied before the call returns ---
static int to_device(Address to, const void* from, size_t bytes) {
  if (!holds((void*)to, bytes)) return ILLEGAL_ADDRESS;
  memcpy((void*)to, from, bytes);
  machine_written((void*)to, bytes);
  return OK;
}
static int to_host(void* to, Address from, size_t bytes) {
  if (!holds((void*)from, bytes)) return ILLEGAL_ADDRESS;
  memcpy(to, (void*)from, bytes);
  return OK;
}
API cuMemcpyHtoDAsync_v2(Address to, const void* from, size_t bytes, Stream* stream) {
  CONTEXT;
  if (!holds((void*)to, bytes)) return INVALID_VALUE;
  if (is_pinned(from, bytes)) return push(stream, [=] { return is_pinned(from, bytes) ? to_device(to, from, bytes) : ILLEGAL_ADDRESS; });
  if (streams_.count(stream) && stream->capture) return CAPTURE_UNSUPPORTED;
  auto held = std::make_shared<std::string>((const char*)from, bytes);
  return push(stream, [=] { return to_device(to, held->data(), bytes); });
}
API cuMemcpyDtoHAsync_v2(void* to, Address from, size_t bytes, Stream* stream) {
  CONTEXT;
  if (!holds((void*)from, bytes)) return INVALID_VALUE;
  if (is_pinned(to, bytes)) return push(stream, [=] { return is_pinned(to, bytes) ? to_host(to, from, bytes) : ILLEGAL_ADDRESS; });
  if (!streams_.count(stream)) return INVALID_HANDLE;
  if (stream->capture) return CAPTURE_UNSUPPORTED;
  if (int error = drain(stream)) return error;
  return to_host(to, from, bytes);
}
API cuMemsetD8Async(Address to, unsigned char value, size_t bytes, Stream* stream) {
  CONTEXT;
  if (!holds((void*)to, bytes)) return INVALID_VALUE;
  return push(stream, [=]() -> int {
    if (!holds((void*)to, bytes)) return ILLEGAL_ADDRESS;
    memset((void*)to, value, bytes);
    machine_written((void*)to, bytes);
    return OK;
  });
}

// --- images and launches ---
API cuModuleLoadData(Image** image, const void* data) {
  CONTEXT;
  const Elf64_Ehdr& header = *(const Elf64_Ehdr*)data;
  if (memcmp(header.e_ident, ELFMAG, 4)) return INVALID_IMAGE;
  if (header.e_machine != EM_X86_64) return NO_BINARY;
  size_t bytes = header.e_shoff + (size_t)header.e_shnum * header.e_shentsize;
  int file = memfd_create("image", 0);
  char path[64];
  snprintf(path, sizeof path, "/proc/self/fd/%d", file);
  void* library = write(file, data, bytes) == (ssize_t)bytes ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : nullptr;
  if (!library || !machine_is_image(library)) {
    if (const char* why = library ? nullptr : dlerror()) fprintf(stderr, "emulated libcuda: %s\n", why);
    if (library) dlclose(library);
    close(file);
    return INVALID_IMAGE;
  }
  *image = new Image{library, file, {}};  // the file stays open: the loader knows libraries by their paths
  ++live_["module"];
  return OK;
}
API cuModuleUnload(Image* image) {
  CONTEXT;
  for (auto& [name, function] : image->functions) delete function;
  dlclose(image->library);
  close(image->file);
  delete image;
  --live_["module"];
  return OK;
}
API cuModuleGetFunction(Function** function, Image* image, const char* name) {
  CONTEXT;
  const Kernel* kernel = machine_find(image->library, name);
  if (!kernel) return NOT_FOUND;
  auto& found = image->functions[name];
  if (!found) found = new Function{image, kernel};
  *function = found;
  return OK;
}
API cuFuncSetAttribute(Function* function, int attribute, int value) {
  CONTEXT;
  if (attribute != FUNCTION_SHARED || value > option("FAKECUDA_SHARED", MOST_SHARED)) return INVALID_VALUE;
  function->shared_limit = value;
  return OK;
}
API cuFuncLoad(Function* function) { CONTEXT; function->is_loaded = true; return OK; }
API cuLaunchKernel(Function* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, Stream* stream, void** parameters, void**) {
  CONTEXT;
  bool is_small = gx && gy && gz && bx && by && bz;
  if (!is_small || gx > 0x7fffffff || gy > 65535 || gz > 65535 || (size_t)bx * by * bz > 1024 || bz > 64 || (int)shared > function->shared_limit) return INVALID_VALUE;
  if (!function->is_loaded && streams_.count(stream) && stream->capture) return CAPTURE_UNSUPPORTED;  // loading may wait for the device
  const Kernel& kernel = *function->kernel;
  auto values = std::make_shared<std::vector<std::string>>();  // a launch has the values of now, whenever it runs
  for (int i = 0; i < kernel.parameters; ++i) values->emplace_back((char*)parameters[i], kernel.sizes[i]);
  Grid grid{{gx, gy, gz}, {bx, by, bz}, shared};
  void* library = function->image->library;
  return push(stream, [=, &kernel]() -> int {
    ++live_["launches"];
    std::vector<void*> places;
    for (auto& value : *values) places.push_back(value.data());
    return machine_launch(library, kernel, grid, places.data()) ? ILLEGAL_ADDRESS : OK;
  });
}

// --- streams, events, graphs ---
API cuStreamCreate(Stream** stream, unsigned) { CONTEXT; streams_.insert(*stream = new Stream); ++live_["stream"]; return OK; }
API cuStreamDestroy_v2(Stream* stream) { CONTEXT; if (!streams_.erase(stream)) return INVALID_HANDLE; drain(stream); delete stream; --live_["stream"]; return OK; }
API cuStreamSynchronize(Stream* stream) {
  CONTEXT;
  if (!streams_.count(stream)) return INVALID_HANDLE;
  if (stream->capture) { stream->is_invalid = true; return CAPTURE_UNSUPPORTED; }
  return drain(stream);
}
API cuStreamBeginCapture_v2(Stream* stream, int) {
  CONTEXT;
  if (!streams_.count(stream)) return INVALID_HANDLE;
  if (stream->capture) return CAPTURE_UNSUPPORTED;
  stream->capture.reset(new Graph);
  stream->is_invalid = false;
  return OK;
}
API cuStreamEndCapture(Stream* stream, Graph** graph) {
  CONTEXT;
  *graph = nullptr;
  if (!streams_.count(stream) || !stream->capture) return INVALID_VALUE;
  auto made = std::move(stream->capture);
  if (stream->is_invalid) return CAPTURE_INVALIDATED;
  *graph = made.release();
  ++live_["graph"];
  return OK;
}
API cuGraphInstantiateWithFlags(Graph** executable, Graph* graph, unsigned long long) { CONTEXT; *executable = new Graph(*graph); ++live_["executable"]; return OK; }
API cuGraphLaunch(Graph* executable, Stream* stream) {
  CONTEXT;
  for (auto& node : executable->nodes) if (int error = push(stream, node)) return error;
  ++live_["graph launches"];
  return OK;
}
API cuGraphDestroy(Graph* graph) { CONTEXT; delete graph; --live_["graph"]; return OK; }
API cuGraphExecDestroy(Graph* graph) { CONTEXT; delete graph; --live_["executable"]; return OK; }
API cuEventCreate(Event** event, unsigned) { CONTEXT; *event = new Event; ++live_["event"]; return OK; }
API cuEventDestroy_v2(Event*) { CONTEXT; --live_["event"]; return OK; }  // kept: a stream may still record it
API cuEventRecord(Event* event, Stream* stream) {
  CONTEXT;
  event->is_done = false;
  return push(stream, [=]() -> int { event->is_done = true; event->time = std::chrono::steady_clock::now(); return OK; });
}
API cuEventSynchronize(Event* event) { CONTEXT; for (Stream* stream : streams_) drain(stream); return event->is_done ? OK : NOT_READY; }
API cuEventElapsedTime(float* milliseconds, Event* first, Event* last) {
  CONTEXT;
  if (!first->is_done || !last->is_done) return NOT_READY;
  *milliseconds = std::chrono::duration<float, std::milli>(last->time - first->time).count();
  return OK;
}

// --- for the tests ---
VISIBLE void fakecuda_fail(const char* failure) { std::lock_guard<std::recursive_mutex> guard(mutex_); failure_ = failure; calls_.clear(); }
VISIBLE void fakecuda_recover() {  // as if the process began anew
  std::lock_guard<std::recursive_mutex> guard(mutex_);
  for (auto& [start, bytes] : mapped_) machine_unmap(start, bytes);
  for (Stream* stream : streams_) stream->queue.clear();
  mapped_.clear(), reserved_.clear(), pinned_.clear(), allocated_.clear(), behind_.clear();
  physical_.clear(), streams_.clear(), live_.clear(), current_.clear(), failure_.clear();
  contexts_ = sticky_ = used_ = 0;
  machine_forget_findings();
}
VISIBLE const char* fakecuda_findings() { return machine_findings(); }
static const char* table(const std::map<std::string, long>& numbers) {
  text_.clear();
  for (auto& [name, number] : numbers) text_ += name + "=" + std::to_string(number) + "\n";
  return text_.c_str();
}
VISIBLE const char* fakecuda_calls() { std::lock_guard<std::recursive_mutex> guard(mutex_); return table(calls_); }  // since the last fakecuda_fail
VISIBLE const char* fakecuda_live() { std::lock_guard<std::recursive_mutex> guard(mutex_); live_["bytes"] = used_; return table(live_); }
