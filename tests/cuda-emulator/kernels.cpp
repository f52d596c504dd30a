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
using sideways_emulator::Runner;

struct Function {
    const KernelEntry* entry;
    Module* module;
    size_t dynamic_limit = 48 << 10;
};
struct Module {
    void* object = nullptr;
    std::map<std::string, std::unique_ptr<Function>> functions;
};

// ---- Running a block ----
__thread Block* sideways_emulator_block __attribute__((tls_model("initial-exec")));

namespace {
struct Thread {  // a started thread of the block that waits, with the fiber it waits in
    enum State { Running, AtBarrier, InExchange, Ready } state = Running;
    unsigned index = 0, mask = 0;
    sideways_emulator::Index position;
};
struct Scheduler;
struct Lane : Runner {  // a fiber and the thread that it runs now
    Fiber fiber;
    Thread thread;
    Scheduler* scheduler = nullptr;
    bool finished = false;
};
struct Warp {
    unsigned long long values[2][32] = {};
    unsigned phase[32] = {};  // of each lane's next exchange
    unsigned waiting = 0;   // lanes in an exchange
    unsigned alive = 0;     // lanes not yet finished
};
struct Scheduler {
    Block block;
    Fiber main;
    std::vector<std::unique_ptr<Lane>> lanes;  // kept between blocks and launches
    std::vector<Lane*> spare, waiting, ready;
    std::vector<Lane*> by_thread;
    std::vector<Warp> warps;
    std::vector<char> shared;
    unsigned threads = 0, started = 0, finished = 0, at_barrier = 0;
    Lane* running = nullptr;
    const KernelEntry* entry = nullptr;
    void** arguments = nullptr;

    Lane* take_lane();
    void run_block();
    void park();
    bool release_exchange(unsigned warp);
    void resume(Lane* lane);
};
}  // namespace

static Scheduler& scheduler_of(Block* block) { return *reinterpret_cast<Scheduler*>(block); }
static_assert(offsetof(Scheduler, block) == 0);

static bool next_thread(Runner* runner) {
    Lane& lane = *static_cast<Lane*>(runner);
    Scheduler& s = *lane.scheduler;
    if (lane.thread.index != ~0u) {  // the thread before has ended
        s.finished++;
        unsigned index = lane.thread.index;
        s.warps[index / 32].alive &= ~(1u << (index % 32));
    }
    if (s.started == s.threads) {
        lane.thread.index = ~0u;
        return false;
    }
    unsigned index = s.started++;
    const auto& size = s.block.block_size;
    lane.thread.index = index;
    lane.thread.position = {index % size.x, index / size.x % size.y, index / (size.x * size.y)};
    s.by_thread[index] = &lane;
    s.block.thread = lane.thread.position;
    s.block.linear_thread = index;
    return true;
}

static void fiber_main(void* argument) {
    Lane& lane = *(Lane*)argument;
    for (;;) {
        lane.scheduler->entry->run(&lane, lane.scheduler->arguments);
        lane.finished = true;
        fiber_switch(lane.fiber, lane.scheduler->main);
    }
}

Lane* Scheduler::take_lane() {
    if (spare.empty()) {
        lanes.push_back(std::make_unique<Lane>());
        Lane* lane = lanes.back().get();
        lane->scheduler = this;
        lane->block = &block;
        lane->next = next_thread;
        fiber_start(lane->fiber, fiber_main, lane);
        return lane;
    }
    Lane* lane = spare.back();
    spare.pop_back();
    return lane;
}

void Scheduler::resume(Lane* lane) {
    running = lane;
    lane->thread.state = Thread::Running;
    if (lane->thread.index != ~0u) {
        block.thread = lane->thread.position;
        block.linear_thread = lane->thread.index;
    }
    fiber_switch(main, lane->fiber);
    if (lane->finished) spare.push_back(lane);
}

// The running fiber waits: back to the scheduler.
void Scheduler::park() {
    Lane* lane = running;
    fiber_switch(lane->fiber, main);
}

static void barrier(Block* block) {
    Scheduler& s = scheduler_of(block);
    s.running->thread.state = Thread::AtBarrier;
    s.at_barrier++;
    s.waiting.push_back(s.running);
    s.park();
}

// Lets go those lanes of a warp whose whole mask has arrived.
bool Scheduler::release_exchange(unsigned w) {
    Warp& warp = warps[w];
    bool any = false;
    for (unsigned l = 0; l < 32 && warp.waiting; l++) {
        if (!(warp.waiting >> l & 1)) continue;
        unsigned mask = by_thread[w * 32 + l]->thread.mask & warp.alive;
        if ((warp.waiting & mask) != mask) continue;
        for (unsigned other = 0; other < 32; other++) {
            if (!(mask >> other & 1)) continue;
            Lane* lane = by_thread[w * 32 + other];
            lane->thread.state = Thread::Ready;
            ready.push_back(lane);
        }
        warp.waiting &= ~mask;
        any = true;
    }
    return any;
}

static const unsigned long long* exchange(Block* block, unsigned mask, unsigned long long value) {
    Scheduler& s = scheduler_of(block);
    Lane* lane = s.running;
    unsigned index = lane->thread.index, l = index % 32;
    Warp& warp = s.warps[index / 32];
    if (!(mask >> l & 1)) die("kernel %s: a thread calls a warp function with a mask that lacks itself", s.entry->name);
    unsigned phase = warp.phase[l]++ % 2;
    warp.values[phase][l] = value;
    warp.waiting |= 1u << l;
    lane->thread.mask = mask;
    lane->thread.state = Thread::InExchange;
    s.park();
    return warp.values[phase];
}

void Scheduler::run_block() {
    started = finished = at_barrier = 0;
    waiting.clear();
    ready.clear();
    by_thread.assign(threads, nullptr);
    warps.resize((threads + 31) / 32);
    for (unsigned w = 0; w < warps.size(); w++) {
        unsigned size = std::min(32u, threads - w * 32);
        warps[w] = {};
        warps[w].alive = size == 32 ? ~0u : (1u << size) - 1;
    }
    while (finished < threads) {
        if (!ready.empty()) {
            Lane* lane = ready.back();
            ready.pop_back();
            resume(lane);
        } else if (started < threads) {
            Lane* lane = take_lane();
            lane->finished = false;
            lane->thread.index = ~0u;
            resume(lane);
        } else {
            bool any = false;
            for (unsigned w = 0; w < warps.size(); w++) any |= warps[w].waiting && release_exchange(w);
            if (any) continue;
            if (at_barrier == threads - finished && at_barrier) {
                if (finished) {
                    static std::atomic<bool> said{false};
                    if (!said.exchange(true))
                        complain("kernel %s: %u of %u threads returned before a __syncthreads() of the others",
                                 entry->name, finished, threads);
                }
                ready.swap(waiting);
                waiting.clear();
                at_barrier = 0;
                continue;
            }
            die("kernel %s hangs: %u of %u threads wait at __syncthreads(), the others in a warp function for threads "
                "that do not come", entry->name, at_barrier, threads - finished);
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
    s.threads = size[0] * size[1] * size[2];
    s.shared.resize(shared_bytes + 256);
    memset(s.shared.data(), 0xFF, s.shared.size());
    s.block.dynamic_shared = (char*)(((uint64_t)s.shared.data() + 127) / 128 * 128);
    s.block.grid_size = {grid[0], grid[1], grid[2]};
    s.block.block_size = {size[0], size[1], size[2]};
    s.block.barrier = barrier;
    s.block.exchange = exchange;
    sideways_emulator_block = &s.block;
    for (unsigned z = 0; z < grid[2]; z++)
        for (unsigned y = 0; y < grid[1]; y++)
            for (unsigned x = 0; x < grid[0]; x++) {
                s.block.block = {x, y, z};
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
