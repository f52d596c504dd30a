// NVRTC: compiles CUDA C++ with the host's C++ compiler. The "PTX" names the object that came out; objects are kept in
// a directory, by a hash of everything that goes into them, so that every rank but the first finds them there.
#include "abi.h"
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <fcntl.h>
#include <filesystem>
#include <fstream>
#include <map>
#include <mutex>
#include <regex>
#include <set>
#include <spawn.h>
#include <sstream>
#include <string>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include <vector>

extern char** environ;

enum nvrtcResult : int {
    NVRTC_SUCCESS = 0,
    NVRTC_ERROR_OUT_OF_MEMORY = 1,
    NVRTC_ERROR_PROGRAM_CREATION_FAILURE = 2,
    NVRTC_ERROR_INVALID_INPUT = 3,
    NVRTC_ERROR_INVALID_PROGRAM = 4,
    NVRTC_ERROR_INVALID_OPTION = 5,
    NVRTC_ERROR_COMPILATION = 6,
    NVRTC_ERROR_INTERNAL_ERROR = 11,
};

struct Program {
    std::string source, name, log, ptx;
    std::vector<std::pair<std::string, std::string>> headers;
};
typedef Program* nvrtcProgram;

// ---- Files and processes ----
static std::string library_folder() {
    Dl_info info;
    if (!dladdr((void*)&library_folder, &info) || !info.dli_fname) return ".";
    char* real = realpath(info.dli_fname, nullptr);
    std::string path = real ? real : info.dli_fname;
    free(real);
    return path.substr(0, path.find_last_of('/'));
}
static bool make_folder(const std::string& path) {
    for (size_t at = 1; at != std::string::npos;) {
        at = path.find('/', at + 1);
        mkdir(path.substr(0, at).c_str(), 0777);
    }
    return access(path.c_str(), W_OK) == 0;
}
static std::string cache_folder() {
    const char* wanted = getenv("SIDEWAYS_EMULATOR_CACHE");
    std::string path = wanted && *wanted ? wanted : library_folder() + "/kernels";
    if (make_folder(path)) return path;
    path = "/tmp/sideways-emulator-" + std::to_string(getuid());
    make_folder(path);
    return path;
}
static std::string read_file(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    std::stringstream text;
    text << file.rdbuf();
    return text.str();
}
static bool write_file(const std::string& path, const std::string& text) {
    std::ofstream file(path, std::ios::binary);
    file << text;
    file.close();
    return file.good();
}
// Runs a command with its output in `log`; its exit status, or -1.
static int run(const std::vector<std::string>& command, const std::string& log) {
    std::vector<char*> arguments;
    for (auto& a : command) arguments.push_back((char*)a.c_str());
    arguments.push_back(nullptr);
    posix_spawn_file_actions_t files;
    posix_spawn_file_actions_init(&files);
    posix_spawn_file_actions_addopen(&files, 0, "/dev/null", O_RDONLY, 0);
    posix_spawn_file_actions_addopen(&files, 1, log.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0666);
    posix_spawn_file_actions_adddup2(&files, 1, 2);
    std::vector<char*> environment;  // without what a profiler or a sanitizer preloads
    for (char** e = environ; *e; e++)
        if (strncmp(*e, "LD_PRELOAD=", 11)) environment.push_back(*e);
    environment.push_back(nullptr);
    pid_t process;
    int failed = posix_spawnp(&process, arguments[0], &files, nullptr, arguments.data(), environment.data());
    posix_spawn_file_actions_destroy(&files);
    if (failed) {
        write_file(log, "cannot run " + command[0] + ": " + strerror(failed) + "\n");
        return -1;
    }
    int status = 0;
    while (waitpid(process, &status, 0) < 0)
        if (errno != EINTR) return -1;
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}
static std::string hash(const std::string& text) {
    uint64_t a = 14695981039346656037ull, b = 0x9E3779B97F4A7C15ull;
    for (unsigned char c : text) {
        a = (a ^ c) * 1099511628211ull;
        b = (b + c) * 0xD1B54A32D192ED03ull;
        b ^= b >> 29;
    }
    char digits[40];
    snprintf(digits, sizeof digits, "%016llx%016llx", (unsigned long long)a, (unsigned long long)b);
    return digits;
}
static std::string compiler() {
    const char* wanted = getenv("SIDEWAYS_EMULATOR_CXX");
    return wanted && *wanted ? wanted : "c++";
}

// ---- From CUDA C++ to C++ ----
static bool identifier(char c) { return isalnum((unsigned char)c) || c == '_'; }

// The source with string literals, character literals and line markers blanked, of the same length.
static std::string blanked(const std::string& text) {
    std::string out = text;
    bool line_start = true;
    for (size_t i = 0; i < text.size(); i++) {
        char c = text[i];
        if (line_start && c == '#') {
            while (i < text.size() && text[i] != '\n') out[i++] = ' ';
            continue;
        }
        if (c == '"' || c == '\'') {
            bool linkage = text.compare(i, 3, "\"C\"") == 0;  // of extern "C": kept
            if (linkage) {
                i += 2;
                continue;
            }
            for (i++; i < text.size() && text[i] != c; i++) {
                if (text[i] == '\\') out[i++] = ' ';
                out[i] = ' ';
            }
        }
        if (!isspace((unsigned char)c)) line_start = false;
        if (c == '\n') line_start = true;
    }
    return out;
}

struct Kernel {
    std::string name, bounds;
};
// The kernels with C linkage that the preprocessed source defines.
static std::vector<Kernel> find_kernels(const std::string& source) {
    std::string text = blanked(source);
    std::vector<Kernel> kernels;
    std::set<std::string> seen;
    std::vector<bool> scopes;  // whether each open brace is that of an extern "C" block
    size_t statement = 0;      // where the current statement began
    auto skip_group = [&](size_t i) {  // past the parenthesis that opens at i
        int depth = 0;
        for (; i < text.size(); i++) {
            if (text[i] == '(') depth++;
            if (text[i] == ')' && --depth == 0) return i + 1;
        }
        return i;
    };
    for (size_t i = 0; i < text.size(); i++) {
        if (text[i] == '{') {
            static const std::regex block(R"(^\s*extern\s*"C"\s*$)");
            scopes.push_back(std::regex_search(text.substr(statement, i - statement), block));
            statement = i + 1;
        } else if (text[i] == '}') {
            if (!scopes.empty()) scopes.pop_back();
            statement = i + 1;
        } else if (text[i] == ';') {
            statement = i + 1;
        } else if (text.compare(i, 10, "__global__") == 0 && (i == 0 || !identifier(text[i - 1]))) {
            std::string before = text.substr(statement, i - statement);
            bool c_linkage = before.find("extern") != std::string::npos && before.find("\"C\"") != std::string::npos;
            bool in_block = !scopes.empty() && scopes.back();
            bool is_template = before.find("template") != std::string::npos;
            Kernel kernel;
            std::string word;
            size_t j = i + 10;
            for (; j < text.size() && text[j] != '{' && text[j] != ';';) {
                if (identifier(text[j])) {
                    size_t end = j;
                    while (end < text.size() && identifier(text[end])) end++;
                    word = text.substr(j, end - j);
                    j = end;
                } else if (text[j] == '(') {
                    size_t end = skip_group(j);
                    if (word == "__launch_bounds__") {
                        std::string inside = source.substr(j + 1, end - j - 2);
                        kernel.bounds = inside.substr(0, inside.find(','));
                    } else if (word != "__attribute__" && word != "__align__") {
                        kernel.name = word;
                    }
                    j = end;
                } else {
                    j++;
                }
            }
            if ((c_linkage || in_block) && !is_template && j < text.size() && text[j] == '{' && !kernel.name.empty() &&
                seen.insert(kernel.name).second)
                kernels.push_back(kernel);
            i = j - 1;
        }
    }
    return kernels;
}

static std::string translate(const std::string& preprocessed) {
    // extern __shared__ T name[];  ->  a pointer to the launch's shared memory
    static const std::regex dynamic(R"(extern\s+__shared__\s+((?:__align__\s*\([^)]*\)\s*)?)([^;\[\]]*?)\b(\w+)\s*\[\s*\]\s*;)");
    std::string body = std::regex_replace(
        preprocessed, dynamic, "$2* const $3 = ($2*)sideways_emulator_block->dynamic_shared;");
    std::string out = "#include \"kernel_prelude.h\"\n" + body + "\n";
    out += "extern \"C\" __attribute__((visibility(\"default\"))) "
           "const ::sideways_emulator::KernelEntry sideways_emulator_kernels[] = {\n";
    for (auto& kernel : find_kernels(body))
        out += "    ::sideways_emulator::Kernel<::" + kernel.name + ">::entry(\"" + kernel.name + "\", " +
               (kernel.bounds.empty() ? "0" : kernel.bounds) + "),\n";
    return out + "    {nullptr, nullptr, nullptr, nullptr, 0, 0}};\n";
}

// ---- The API ----
EXPORT nvrtcResult nvrtcVersion(int* major, int* minor) {
    *major = 13;
    *minor = 0;
    return NVRTC_SUCCESS;
}
EXPORT nvrtcResult nvrtcGetNumSupportedArchs(int* n) {
    *n = 1;
    return NVRTC_SUCCESS;
}
EXPORT nvrtcResult nvrtcGetSupportedArchs(int* archs) {
    archs[0] = 90;
    return NVRTC_SUCCESS;
}
EXPORT const char* nvrtcGetErrorString(nvrtcResult result) {
    switch (result) {
    case NVRTC_SUCCESS: return "NVRTC_SUCCESS";
    case NVRTC_ERROR_INVALID_INPUT: return "NVRTC_ERROR_INVALID_INPUT";
    case NVRTC_ERROR_INVALID_PROGRAM: return "NVRTC_ERROR_INVALID_PROGRAM";
    case NVRTC_ERROR_INVALID_OPTION: return "NVRTC_ERROR_INVALID_OPTION";
    case NVRTC_ERROR_COMPILATION: return "NVRTC_ERROR_COMPILATION";
    default: return "NVRTC_ERROR_INTERNAL_ERROR";
    }
}
EXPORT nvrtcResult nvrtcCreateProgram(nvrtcProgram* program, const char* source, const char* name, int headers,
                                      const char* const* texts, const char* const* names) {
    if (!program || !source) return NVRTC_ERROR_INVALID_INPUT;
    auto* created = new Program;
    created->source = source;
    created->name = name && *name ? name : "default_program";
    for (int i = 0; i < headers; i++) created->headers.emplace_back(names[i], texts[i]);
    *program = created;
    return NVRTC_SUCCESS;
}
EXPORT nvrtcResult nvrtcDestroyProgram(nvrtcProgram* program) {
    if (!program || !*program) return NVRTC_ERROR_INVALID_PROGRAM;
    delete *program;
    *program = nullptr;
    return NVRTC_SUCCESS;
}

static nvrtcResult compile(Program& program, const std::vector<std::string>& defines, const std::string& work) {
    const std::string object_flags = "-std=c++17 -O2 -g -fPIC -shared -fvisibility=hidden -fno-strict-aliasing -w";
    std::string folder = library_folder(), log = work + "/log";
    for (auto& [name, text] : program.headers) write_file(work + "/" + name, text);
    write_file(work + "/program.cu", "#line 1 \"" + program.name + "\"\n" + program.source);
    std::vector<std::string> command = {compiler(), "-std=c++17", "-x", "c++", "-E", "-D__CUDA_ARCH__=900", "-D__CUDACC__",
                                        "-D__CUDACC_RTC__", "-Dglobaltimer=globaltimer", "-I", work};
    command.insert(command.end(), defines.begin(), defines.end());
    command.insert(command.end(), {work + "/program.cu", "-o", work + "/program.ii"});
    int status = run(command, log);
    program.log = read_file(log);
    if (status) return NVRTC_ERROR_COMPILATION;
    std::string code = translate(read_file(work + "/program.ii"));
    // Line markers name the work folder, which differs each time.
    for (size_t at; (at = code.find(work)) != std::string::npos;) code.replace(at, work.size(), "");
    std::string cache = cache_folder();
    std::string key = hash(code + '\0' + object_flags + '\0' + compiler() + '\0' + read_file(folder + "/kernel_prelude.h") +
                           read_file(folder + "/kernel_abi.h"));
    std::string object = cache + "/" + key + ".so", lock_path = cache + "/" + key + ".lock";
    if (access(object.c_str(), R_OK)) {
        int lock = open(lock_path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
        if (lock >= 0) flock(lock, LOCK_EX);
        if (access(object.c_str(), R_OK)) {  // nobody else made it meanwhile
            write_file(work + "/program.cpp", code);
            std::vector<std::string> build = {compiler()};
            std::stringstream words(object_flags);
            for (std::string word; words >> word;) build.push_back(word);
            std::string made = object + "." + std::to_string(getpid());
            build.insert(build.end(), {"-I", folder, work + "/program.cpp", folder + "/libcuda.so.1", "-o", made});
            status = run(build, log);
            program.log += read_file(log);
            if (!status && rename(made.c_str(), object.c_str())) status = -1;
            if (status) unlink(made.c_str());
        }
        if (lock >= 0) close(lock);
        if (status) return NVRTC_ERROR_COMPILATION;
    }
    program.ptx = "//\n// Not PTX: compiled for the CPU by the sideways CUDA emulator.\n"
                  "// sideways-emulator-object: " + object + "\n//\n.version 9.0\n.target sm_90\n";
    return NVRTC_SUCCESS;
}

EXPORT nvrtcResult nvrtcCompileProgram(nvrtcProgram program, int n, const char* const* options) {
    if (!program) return NVRTC_ERROR_INVALID_PROGRAM;
    program->log.clear();
    program->ptx.clear();
    std::vector<std::string> defines;
    for (int i = 0; i < n; i++) {
        std::string option = options[i];
        auto value_of = [&](std::initializer_list<const char*> names, const char* flag) {
            for (std::string name : names) {
                bool is_long = name.size() > 2;
                if (option == name) {  // the value is the next option
                    if (++i < n) defines.push_back(flag + std::string(options[i]));
                    return true;
                }
                std::string start = is_long ? name + "=" : name;
                if (option.compare(0, start.size(), start) == 0) {
                    defines.push_back(flag + option.substr(start.size()));
                    return true;
                }
            }
            return false;
        };
        if (value_of({"-D", "--define-macro"}, "-D") || value_of({"-U", "--undefine-macro"}, "-U") ||
            value_of({"-I", "--include-path"}, "-I"))
            continue;
        if (option.empty() || option[0] != '-') {
            program->log = "nvrtc: error: invalid value for option: " + option + "\n";
            return NVRTC_ERROR_INVALID_OPTION;
        }
    }
    std::error_code none;
    std::string work = (std::filesystem::temp_directory_path(none) / "sideways-nvrtc-XXXXXX").string();
    if (none || !mkdtemp(work.data())) return NVRTC_ERROR_INTERNAL_ERROR;
    nvrtcResult result = compile(*program, defines, work);
    for (const char* file : {"/log", "/program.cu", "/program.ii", "/program.cpp"}) unlink((work + file).c_str());
    for (auto& header : program->headers) unlink((work + "/" + header.first).c_str());
    rmdir(work.c_str());
    return result;
}

static nvrtcResult size_of(const std::string& text, size_t* size) {
    if (!size) return NVRTC_ERROR_INVALID_INPUT;
    *size = text.size() + 1;
    return NVRTC_SUCCESS;
}
static nvrtcResult copy_out(const std::string& text, char* to) {
    if (!to) return NVRTC_ERROR_INVALID_INPUT;
    memcpy(to, text.c_str(), text.size() + 1);
    return NVRTC_SUCCESS;
}
EXPORT nvrtcResult nvrtcGetProgramLogSize(nvrtcProgram p, size_t* size) { return size_of(p->log, size); }
EXPORT nvrtcResult nvrtcGetProgramLog(nvrtcProgram p, char* to) { return copy_out(p->log, to); }
EXPORT nvrtcResult nvrtcGetPTXSize(nvrtcProgram p, size_t* size) { return size_of(p->ptx, size); }
EXPORT nvrtcResult nvrtcGetPTX(nvrtcProgram p, char* to) { return copy_out(p->ptx, to); }
EXPORT nvrtcResult nvrtcGetCUBINSize(nvrtcProgram p, size_t* size) { return size_of(p->ptx, size); }
EXPORT nvrtcResult nvrtcGetCUBIN(nvrtcProgram p, char* to) { return copy_out(p->ptx, to); }
EXPORT nvrtcResult nvrtcAddNameExpression(nvrtcProgram, const char*) { return NVRTC_ERROR_INVALID_INPUT; }
