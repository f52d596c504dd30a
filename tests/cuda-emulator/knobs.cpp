// Environment knobs, counters and the ways to complain.
#include "emulator.h"
#include <cstdarg>
#include <cstdlib>
#include <cstring>
#include <unistd.h>

static unsigned long long number(const char* name, unsigned long long otherwise) {
    const char* text = getenv(name);
    if (!text || !*text) return otherwise;
    char* end = nullptr;
    unsigned long long value = strtoull(text, &end, 10);
    if (*end) die("%s=%s is not a number", name, text);
    return value;
}

const Knobs& knobs() {
    static const Knobs* value = [] {
        auto* k = new Knobs;
        k->devices = (int)number("SIDEWAYS_EMULATOR_DEVICES", 1);
        k->memory = number("SIDEWAYS_EMULATOR_MEMORY", 8ull << 30);
        k->copy_delay_us = (unsigned)number("SIDEWAYS_EMULATOR_COPY_DELAY_US", 0);
        k->launch_delay_us = (unsigned)number("SIDEWAYS_EMULATOR_LAUNCH_DELAY_US", 0);
        k->capture_delay_us = (unsigned)number("SIDEWAYS_EMULATOR_CAPTURE_DELAY_US", 0);
        k->jitter_us = (unsigned)number("SIDEWAYS_EMULATOR_JITTER_US", 0);
        k->peer = number("SIDEWAYS_EMULATOR_PEER", 1) != 0;
        const char* order = getenv("SIDEWAYS_EMULATOR_GRAPH_ORDER");
        k->shuffle_graphs = order && !strcmp(order, "shuffled");
        return k;
    }();
    return *value;
}

// The file that a variable names, with the process's id for %p; nothing where there is none.
static std::string of_process(const char* variable) {
    const char* pattern = getenv(variable);
    std::string path = pattern ? pattern : "";
    size_t at = path.find("%p");
    if (at != std::string::npos) path.replace(at, 2, std::to_string(getpid()));
    return path;
}

static std::mutex& counter_mutex() {
    static auto* mutex = new std::mutex;
    return *mutex;
}
static std::map<std::string, unsigned long long>& counters() {
    static auto* map = new std::map<std::string, unsigned long long>;
    return *map;
}

// SIDEWAYS_EMULATOR_LOG=FILE (%p: process id): see README.md.
static FILE* log_file() {
    static FILE* file = [] {
        std::string path = of_process("SIDEWAYS_EMULATOR_LOG");
        FILE* opened = path.empty() ? nullptr : fopen(path.c_str(), "w");
        if (!path.empty() && !opened) complain("cannot write %s", path.c_str());
        return opened;
    }();
    return file;
}
void note(const char* what, unsigned long long stream, const std::string& name, size_t bytes) {
    FILE* file = log_file();
    if (!file) return;
    static std::atomic<unsigned> threads{0};
    thread_local unsigned thread = ++threads;
    fprintf(file, "%s thread %u stream %llu bytes %zu %s\n", what, thread, stream, bytes, name.c_str());
    fflush(file);
}

void count(const char* what, unsigned long long n) {
    if (!strcmp(what, "sync") || !strcmp(what, "event_sync") || !strcmp(what, "blocking_copy")) note("waits", 0, what, 0);
    std::lock_guard<std::mutex> lock(counter_mutex());
    counters()[what] += n;
}

// How often something happened so far in this process (README.md lists the names); 0 for unknown names.
EXPORT unsigned long long sideways_emulator_count(const char* what) {
    std::lock_guard<std::mutex> lock(counter_mutex());
    auto found = counters().find(what);
    return found == counters().end() ? 0 : found->second;
}
EXPORT void sideways_emulator_add(const char* what, unsigned long long n) { count(what, n); }

// SIDEWAYS_EMULATOR_COUNTERS=FILE: the counters, one `name value` a line, when the process ends; %p is its id.
static void write_counters() {
    std::string path = of_process("SIDEWAYS_EMULATOR_COUNTERS");
    if (path.empty()) return;
    FILE* file = fopen(path.c_str(), "w");
    if (!file) {
        complain("cannot write %s", path.c_str());
        return;
    }
    std::lock_guard<std::mutex> lock(counter_mutex());
    for (auto& [name, value] : counters()) fprintf(file, "%s %llu\n", name.c_str(), value);
    fclose(file);
}

__attribute__((destructor)) static void at_exit() {
    write_counters();
    check_all_guards();
}

static void say(const char* format, va_list arguments) {
    char text[1024];
    vsnprintf(text, sizeof text, format, arguments);
    char line[1200];
    int length = snprintf(line, sizeof line, "sideways CUDA emulator: %s\n", text);
    if (write(STDERR_FILENO, line, (size_t)length) < 0) return;
}

void complain(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    say(format, arguments);
    va_end(arguments);
}

void die(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    say(format, arguments);
    va_end(arguments);
    abort();
}
EXPORT void sideways_emulator_die(const char* text) { die("%s", text); }
