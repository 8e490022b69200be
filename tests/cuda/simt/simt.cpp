// The machine: fibers for a block's threads, device memory with shadow cells, barriers, warp
// collectives, asynchronous copies. It reports races, accesses out of bounds, reads of what nobody
// wrote, misaligned accesses and barriers that some threads miss.
//
// Kernels are compiled with -fsanitize=thread, whose calls __tsan_readN/__tsan_writeN are defined
// here (no sanitizer runtime). Order is kept as in FastTrack: every access has its thread's clock;
// a block barrier raises the clock of all, partial barriers (warp, named, mbarrier) join vector
// clocks. Kernels of one stream are ordered; blocks of one kernel only by atomics and fences.
#include "threads.h"
#include "traffic.h"
#include "order.h"
#include "barriers.h"
#include "copies.h"
#include "hopper.h"
#include "launch.h"
