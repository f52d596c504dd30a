// Modules, functions and kernel launches.
//
// The blocks of a launch run one after the other on the stream's thread. A block's threads run one after the other in
// one fiber until one of them has to wait (a barrier, a shuffle); that fiber is put aside and another goes on with the
// threads not yet started. So kernels without barriers are a plain loop.
#include "emulator.h"
#include "fibers.h"
#include "kernel_abi.h"
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>

using sideways_emulator::Block;
using sideways_emulator::KernelEntry;

struct Function {
    const KernelEntry* entry;
    Module* module;
    size_t dynamic_limit = 48 << 10;
};
struct Module {
    Context* context = nullptr;
    void* object = nullptr;
    std::map<std::string, std::unique_ptr<Function>> functions;
};

// ---- Running a block ----
__thread Block* sideways_emulator_block __attribute__((tls_model("initial-exec")));

namespace {
struct Scheduler;
struct Lane {  // a fiber, and the thread that waits in it
    Fiber fiber;
    Scheduler* scheduler = nullptr;
    bool finished = false;  // no thread in it
    sideways_emulator::Index position = {};
    unsigned index = 0, mask = 0;
};
struct Warp {
    unsigned long long given[32] = {}, got[32] = {};  // each lane's value, and what lanes see once all have come
    unsigned in_exchange = 0, at_barrier = 0;         // the lanes that wait
};
struct Scheduler {
    Block block;
    Fiber main;
    std::vector<std::unique_ptr<Lane>> lanes;  // kept between blocks and launches
    std::vector<Lane*> spare, ready;
    std::vector<Lane*> by_thread;  // of the threads that wait
    std::vector<Warp> warps;
    std::vector<char> shared;
    unsigned waiting = 0, at_barrier = 0;
    Lane* running = nullptr;
    const KernelEntry* entry = nullptr;
    void** arguments = nullptr;

    Lane* take_lane();
    void run_block();
    void wait(unsigned Warp::*kind, unsigned mask);
    void release(unsigned thread);
    bool release_exchanges(unsigned warp);
    void resume(Lane* lane);
};
}  // namespace

static Scheduler& scheduler_of(Block* block) { return *reinterpret_cast<Scheduler*>(block); }

static void fiber_main(void* argument) {
    Lane& lane = *(Lane*)argument;
    for (;;) {
        lane.scheduler->entry->run(&lane.scheduler->block, lane.scheduler->arguments);
        lane.finished = true;
        fiber_switch(lane.fiber, lane.scheduler->main);
    }
}

Lane* Scheduler::take_lane() {
    if (spare.empty()) {
        lanes.push_back(std::make_unique<Lane>());
        Lane* lane = lanes.back().get();
        lane->scheduler = this;
        fiber_start(lane->fiber, fiber_main, lane);
        return lane;
    }
    Lane* lane = spare.back();
    spare.pop_back();
    return lane;
}

void Scheduler::resume(Lane* lane) {
    running = lane;
    fiber_switch(main, lane->fiber);
    if (lane->finished) spare.push_back(lane);
}

// The running thread waits: back to the scheduler, until `release`.
void Scheduler::wait(unsigned Warp::*kind, unsigned mask) {
    Lane* lane = running;
    unsigned index = block.linear_thread;
    lane->index = index;
    lane->position = block.thread;
    lane->mask = mask;
    by_thread[index] = lane;
    warps[index / 32].*kind |= 1u << index % 32;
    waiting++;
    fiber_switch(lane->fiber, main);
    block.thread = lane->position;
    block.linear_thread = index;
}
void Scheduler::release(unsigned thread) {
    waiting--;
    ready.push_back(by_thread[thread]);
}

static void barrier(Block* block) {
    Scheduler& s = scheduler_of(block);
    s.at_barrier++;
    s.wait(&Warp::at_barrier, 0);
}

static const unsigned long long* exchange(Block* block, unsigned mask, unsigned long long value) {
    Scheduler& s = scheduler_of(block);
    unsigned l = block->linear_thread % 32;
    Warp& warp = s.warps[block->linear_thread / 32];
    if (!(mask >> l & 1)) die("kernel %s: a thread calls a warp function with a mask that lacks itself", s.entry->name);
    warp.given[l] = value;
    s.wait(&Warp::in_exchange, mask);
    return warp.got;  // read before this thread waits again, so before the next release
}

// Lets go those lanes of a warp whose whole mask has arrived. Every thread that has not ended waits when this is called.
bool Scheduler::release_exchanges(unsigned w) {
    Warp& warp = warps[w];
    const unsigned alive = warp.in_exchange | warp.at_barrier;
    bool any = false;
    for (unsigned l = 0; l < 32; l++) {
        if (!(warp.in_exchange >> l & 1)) continue;
        unsigned mask = by_thread[w * 32 + l]->mask & alive;
        if ((warp.in_exchange & mask) != mask) continue;
        for (unsigned other = 0; other < 32; other++)
            if (mask >> other & 1) {
                warp.got[other] = warp.given[other];
                release(w * 32 + other);
            }
        warp.in_exchange &= ~mask;
        any = true;
    }
    return any;
}

void Scheduler::run_block() {
    block.started = 0;
    block.upcoming = {0, 0, 0};
    waiting = at_barrier = 0;
    if (warps.size() != (block.threads + 31) / 32) warps.resize((block.threads + 31) / 32);
    if (by_thread.size() < block.threads) by_thread.resize(block.threads);
    for (;;) {
        if (!ready.empty()) {
            Lane* lane = ready.back();
            ready.pop_back();
            resume(lane);
        } else if (block.started < block.threads) {
            Lane* lane = take_lane();
            lane->finished = false;
            resume(lane);
        } else if (!waiting) {
            return;
        } else {
            bool any = false;
            for (unsigned w = 0; w < warps.size(); w++) any |= warps[w].in_exchange && release_exchanges(w);
            if (any) continue;
            if (at_barrier != waiting)
                die("kernel %s hangs: %u of %u threads wait at __syncthreads(), others in a warp function for threads "
                    "that do not come", entry->name, at_barrier, waiting);
            if (waiting < block.threads) {
                static std::atomic<bool> said{false};
                if (!said.exchange(true))
                    complain("kernel %s: %u of %u threads ended before a __syncthreads() of the others", entry->name,
                             block.threads - waiting, block.threads);
            }
            for (unsigned w = 0; w < warps.size(); w++) {
                for (unsigned l = 0; l < 32; l++)
                    if (warps[w].at_barrier >> l & 1) release(w * 32 + l);
                warps[w].at_barrier = 0;
            }
            at_barrier = 0;
        }
    }
}

static CUresult run_kernel(const KernelEntry* entry, const unsigned* grid, const unsigned* size, size_t shared_bytes,
                           void** arguments) {
    thread_local std::unique_ptr<Scheduler> own;
    if (!own) own = std::make_unique<Scheduler>();
    Scheduler& s = *own;
    count("kernel");
    s.entry = entry;
    s.arguments = arguments;
    s.block.threads = size[0] * size[1] * size[2];
    s.shared.resize(shared_bytes + 256);
    memset(s.shared.data(), 0xFF, s.shared.size());
    s.block.dynamic_shared = (char*)(((uint64_t)s.shared.data() + 127) / 128 * 128);
    s.block.grid_size = {grid[0], grid[1], grid[2]};
    s.block.block_size = {size[0], size[1], size[2]};
    s.block.barrier = barrier;
    s.block.exchange = exchange;
    sideways_emulator_block = &s.block;
    // Every other launch runs its blocks backwards: nothing may depend on their order.
    static std::atomic<unsigned> launches{0};
    bool backwards = launches++ % 2;
    unsigned long long row = grid[0], plane = row * grid[1], blocks = plane * grid[2];
    for (unsigned long long i = 0; i < blocks; i++) {
        unsigned long long b = backwards ? blocks - 1 - i : i;
        s.block.block = {(unsigned)(b % row), (unsigned)(b % plane / row), (unsigned)(b / plane)};
        s.run_block();
    }
    return CUDA_SUCCESS;
}

// ---- The API: modules ----
EXPORT CUresult cuModuleLoadData(CUmodule* module, const void* image) {
    ENTER(context);
    if (!module || !image) return CUDA_ERROR_INVALID_VALUE;
    // What the emulated NVRTC hands out names the compiled object.
    static const char marker[] = "sideways-emulator-object: ";
    auto* text = (const char*)image;
    if (strncmp(text, "//", 2)) {
        complain("cuModuleLoadData: only what the emulated NVRTC compiled can be loaded");
        return CUDA_ERROR_NO_BINARY_FOR_GPU;
    }
    const char* at = strstr(text, marker);
    if (!at) {
        complain("cuModuleLoadData: PTX of the real compiler cannot run here");
        return CUDA_ERROR_INVALID_PTX;
    }
    at += sizeof marker - 1;
    std::string path(at, strcspn(at, "\n"));
    void* object = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!object) {
        complain("%s", dlerror());
        return CUDA_ERROR_INVALID_PTX;
    }
    auto* table = (const KernelEntry*)dlsym(object, "sideways_emulator_kernels");
    if (!table) return CUDA_ERROR_INVALID_IMAGE;
    auto* loaded = new Module;
    loaded->context = context;
    loaded->object = object;
    for (; table->name; table++)
        loaded->functions[table->name] = std::unique_ptr<Function>(new Function{table, loaded});
    *module = loaded;
    count("module_load");
    return CUDA_SUCCESS;
}
EXPORT CUresult cuModuleLoadDataEx(CUmodule* module, const void* image, unsigned, int*, void**) {
    return cuModuleLoadData(module, image);
}
EXPORT CUresult cuModuleLoadFatBinary(CUmodule*, const void*) { return CUDA_ERROR_NO_BINARY_FOR_GPU; }
EXPORT CUresult cuModuleLoad(CUmodule* module, const char* path) {
    FILE* file = fopen(path, "rb");
    if (!file) return CUDA_ERROR_FILE_NOT_FOUND;
    std::string text;
    char buffer[4096];
    while (size_t n = fread(buffer, 1, sizeof buffer, file)) text.append(buffer, n);
    fclose(file);
    return cuModuleLoadData(module, text.c_str());
}
EXPORT CUresult cuModuleUnload(CUmodule module) {
    if (!module) return CUDA_ERROR_INVALID_HANDLE;
    if (Context* context = current_context()) wait_all_streams(context->device);
    delete module;  // the object stays loaded: captured launches may still name its kernels
    return CUDA_SUCCESS;
}
EXPORT CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
    ENTER(context);
    if (!module || !name) return CUDA_ERROR_INVALID_HANDLE;
    auto found = module->functions.find(name);
    if (found == module->functions.end()) return CUDA_ERROR_NOT_FOUND;
    *function = found->second.get();
    return CUDA_SUCCESS;
}
EXPORT CUresult cuModuleGetFunctionCount(unsigned* n, CUmodule module) {
    *n = (unsigned)module->functions.size();
    return CUDA_SUCCESS;
}
EXPORT CUresult cuModuleGetGlobal_v2(CUdeviceptr*, size_t*, CUmodule, const char*) { return CUDA_ERROR_NOT_SUPPORTED; }
EXPORT CUresult cuModuleGetLoadingMode(int* mode) {
    *mode = 1;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuFuncGetName(const char** name, CUfunction function) {
    *name = function->entry->name;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuFuncGetModule(CUmodule* module, CUfunction function) {
    *module = function->module;
    return CUDA_SUCCESS;
}
static unsigned max_threads(const Function* function) {
    return function->entry->max_threads ? function->entry->max_threads : 1024;
}
EXPORT CUresult cuFuncGetAttribute(int* value, int attribute, CUfunction function) {
    if (!function) return CUDA_ERROR_INVALID_HANDLE;
    switch (attribute) {
    case 0: *value = (int)max_threads(function); break;
    case 4: *value = 32; break;  // registers
    case 5:
    case 6: *value = 90; break;  // PTX and binary version
    case 8: *value = (int)function->dynamic_limit; break;
    default: *value = 0;
    }
    return CUDA_SUCCESS;
}
EXPORT CUresult cuFuncSetAttribute(CUfunction function, int attribute, int value) {
    if (!function) return CUDA_ERROR_INVALID_HANDLE;
    if (attribute == 8) {
        if (value < 0 || value > 232448) return CUDA_ERROR_INVALID_VALUE;
        function->dynamic_limit = (size_t)value;
    }
    return CUDA_SUCCESS;
}
EXPORT CUresult cuFuncSetCacheConfig(CUfunction, int) { return CUDA_SUCCESS; }
EXPORT CUresult cuFuncLoad(CUfunction) { return CUDA_SUCCESS; }

// ---- The API: launches ----
EXPORT CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                               unsigned block_y, unsigned block_z, unsigned shared_bytes, CUstream handle,
                               void** parameters, void** extra) {
    ENTER(context);
    auto stream = find_stream(context, handle);
    if (!stream || !function) return CUDA_ERROR_INVALID_HANDLE;
    const KernelEntry* entry = function->entry;
    if (stream->context != context || function->module->context != context) {
        complain("kernel %s: the stream or the module belongs to another context than the current one", entry->name);
        return CUDA_ERROR_INVALID_HANDLE;
    }
    unsigned long long threads = (unsigned long long)block_x * block_y * block_z;
    if (!grid_x || !grid_y || !grid_z || !threads || grid_x > 2147483647u || grid_y > 65535 || grid_z > 65535 ||
        block_x > 1024 || block_y > 1024 || block_z > 64 || threads > 1024 || shared_bytes > function->dynamic_limit) {
        complain("kernel %s: bad launch: grid %u x %u x %u, block %u x %u x %u, %u bytes of shared memory", entry->name,
                 grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes);
        return CUDA_ERROR_INVALID_VALUE;
    }
    if (threads > max_threads(function)) {
        complain("kernel %s: %llu threads a block, but __launch_bounds__ says %u", entry->name, threads,
                 max_threads(function));
        return CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES;
    }
    if (extra || (entry->arguments && !parameters)) return CUDA_ERROR_INVALID_VALUE;
    struct Launch {
        std::vector<std::vector<char>> values;
        std::vector<void*> pointers;
    };
    auto launch = std::make_shared<Launch>();
    for (unsigned i = 0; i < entry->arguments; i++) {
        auto* from = (const char*)parameters[i];
        if (!from) return CUDA_ERROR_INVALID_VALUE;
        launch->values.emplace_back(from, from + entry->argument_sizes[i]);
        if (!entry->argument_is_pointer[i]) continue;
        void* pointer = *(void**)from;
        if (pointer && !device_address((uint64_t)pointer) && !pinned_range(pointer, 1)) {
            complain("kernel %s: argument %u, %p, is neither device memory nor page-locked", entry->name, i, pointer);
            return CUDA_ERROR_ILLEGAL_ADDRESS;
        }
    }
    for (auto& value : launch->values) launch->pointers.push_back(value.data());
    count("launch");
    return issue(stream, {Work::Launch, std::string("kernel ") + entry->name,
                          [entry, launch, grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes] {
                              unsigned grid[] = {grid_x, grid_y, grid_z}, block[] = {block_x, block_y, block_z};
                              return run_kernel(entry, grid, block, shared_bytes, launch->pointers.data());
                          }});
}
struct LaunchConfig {
    unsigned grid[3], block[3], shared_bytes;
    CUstream stream;
    void* attributes;
    unsigned n;
};
EXPORT CUresult cuLaunchKernelEx(const LaunchConfig* c, CUfunction function, void** parameters, void** extra) {
    return cuLaunchKernel(function, c->grid[0], c->grid[1], c->grid[2], c->block[0], c->block[1], c->block[2],
                          c->shared_bytes, c->stream, parameters, extra);
}
EXPORT CUresult cuLaunchCooperativeKernel(CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                                          unsigned, CUstream, void**) {
    return CUDA_ERROR_NOT_SUPPORTED;
}

// ---- The API: occupancy ----
EXPORT CUresult cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, CUfunction function, int size, size_t,
                                                                     unsigned) {
    if (!function || size < 1 || size > 1024) return CUDA_ERROR_INVALID_VALUE;
    *blocks = 2048 / size < 32 ? 2048 / size : 32;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, CUfunction function, int size, size_t shared) {
    return cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, size, shared, 0);
}
EXPORT CUresult cuOccupancyMaxPotentialBlockSizeWithFlags(int* grid, int* block, CUfunction function, void*, size_t,
                                                          int limit, unsigned) {
    if (!function) return CUDA_ERROR_INVALID_VALUE;
    *block = limit > 0 && limit < 1024 ? limit : 1024;
    *grid = 132 * (2048 / *block);
    return CUDA_SUCCESS;
}
EXPORT CUresult cuOccupancyMaxPotentialBlockSize(int* grid, int* block, CUfunction function, void* f, size_t shared,
                                                 int limit) {
    return cuOccupancyMaxPotentialBlockSizeWithFlags(grid, block, function, f, shared, limit, 0);
}
EXPORT CUresult cuOccupancyAvailableDynamicSMemPerBlock(size_t* bytes, CUfunction, int blocks, int) {
    *bytes = blocks > 0 ? 232448 / (size_t)blocks : 0;
    return CUDA_SUCCESS;
}
