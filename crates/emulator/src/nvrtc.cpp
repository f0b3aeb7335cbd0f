// libnvrtc for the emulator: takes sources, checks what can be checked without a compiler (the emulator's build compiles
// the same sources), and gives an image that the emulated driver loads.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "driver/handles.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

enum Result : int {
    SUCCESS = 0,
    INVALID_INPUT = 3,
    INVALID_PROGRAM = 4,
    INVALID_OPTION = 5,
    COMPILATION = 6,
};

struct Program {
    std::string source, name, log, image;
    std::vector<std::string> headers;       // names
    std::vector<std::string> header_texts;
    bool binary = false;  // for an architecture, not for PTX
    bool compiled = false;
};

// The names in `#include "name"` lines.
std::vector<std::string> included_names(const std::string& text) {
    std::vector<std::string> names;
    const std::string word = "#include \"";
    for (size_t at = text.find(word); at != std::string::npos; at = text.find(word, at + 1)) {
        bool starts_line = at == 0 || text[at - 1] == '\n';
        size_t end = text.find('"', at + word.size());
        if (starts_line && end != std::string::npos) {
            names.push_back(text.substr(at + word.size(), end - at - word.size()));
        }
    }
    return names;
}

// FNV-1a.
unsigned long long hash(const std::string& text) {
    unsigned long long value = 0xcbf29ce484222325ull;
    for (unsigned char byte : text) {
        value = (value ^ byte) * 0x100000001b3ull;
    }
    return value;
}

// An error for each header that is included but was not handed over.
std::string check_includes(const Program& program) {
    std::string errors;
    std::vector<std::string> texts = program.header_texts;
    texts.push_back(program.source);
    for (const std::string& text : texts) {
        for (const std::string& name : included_names(text)) {
            if (std::find(program.headers.begin(), program.headers.end(), name) == program.headers.end()) {
                errors += program.name + ": error: cannot open source file \"" + name + "\"\n";
            }
        }
        if (text.find("#include <") != std::string::npos) {
            errors += program.name + ": error: there is no path for #include <...>\n";
        }
    }
    return errors;
}

bool starts_with(const std::string& text, const char* prefix) {
    return text.compare(0, std::strlen(prefix), prefix) == 0;
}

}  // namespace

using emulator::handles;

EXPORT int nvrtcVersion(int* major, int* minor) {
    *major = 13;
    *minor = 0;
    return SUCCESS;
}

EXPORT const char* nvrtcGetErrorString(int result) {
    switch (result) {
        case SUCCESS:
            return "NVRTC_SUCCESS";
        case INVALID_INPUT:
            return "NVRTC_ERROR_INVALID_INPUT";
        case INVALID_PROGRAM:
            return "NVRTC_ERROR_INVALID_PROGRAM";
        case INVALID_OPTION:
            return "NVRTC_ERROR_INVALID_OPTION";
        case COMPILATION:
            return "NVRTC_ERROR_COMPILATION";
        default:
            return "NVRTC_ERROR unknown";
    }
}

EXPORT int nvrtcGetNumSupportedArchs(int* count) {
    *count = 4;
    return SUCCESS;
}

EXPORT int nvrtcGetSupportedArchs(int* architectures) {
    const int supported[] = {80, 86, 89, 90};
    std::copy(std::begin(supported), std::end(supported), architectures);
    return SUCCESS;
}

EXPORT int nvrtcCreateProgram(Program** handle, const char* source, const char* name, int header_count,
                              const char* const* headers, const char* const* header_names) {
    if (handle == nullptr || source == nullptr || header_count < 0) {
        return INVALID_INPUT;
    }
    auto program = std::make_unique<Program>();
    program->source = source;
    program->name = name != nullptr ? name : "default_program";
    for (int i = 0; i < header_count; i++) {
        program->headers.push_back(header_names[i]);
        program->header_texts.push_back(headers[i]);
    }
    *handle = handles<Program>().add(std::move(program));
    return SUCCESS;
}

EXPORT int nvrtcDestroyProgram(Program** handle) {
    bool removed = handle != nullptr && handles<Program>().remove(*handle) != nullptr;
    if (removed) {
        *handle = nullptr;
    }
    return removed ? SUCCESS : INVALID_PROGRAM;
}

EXPORT int nvrtcCompileProgram(Program* program, int count, const char* const* options) {
    if (!handles<Program>().knows(program)) {
        return INVALID_PROGRAM;
    }
    std::string all_options;
    for (int i = 0; i < count; i++) {
        std::string option = options[i];
        if (option.empty() || option[0] != '-') {
            program->log = "nvrtc: error: invalid option `" + option + "`\n";
            return INVALID_OPTION;
        }
        all_options += option + "\n";
        bool architecture = starts_with(option, "--gpu-architecture=") || starts_with(option, "-arch=");
        if (architecture && option.find("=sm_") != std::string::npos) {
            program->binary = true;
        }
    }
    program->log = check_includes(*program);
    if (!program->log.empty()) {
        return COMPILATION;
    }
    char image[64];
    std::string everything = program->source + all_options;
    for (const std::string& text : program->header_texts) {
        everything += text;
    }
    std::snprintf(image, sizeof image, "emulated %016llx", hash(everything));
    program->image = image;
    program->log = "emulated: nothing was compiled\n";
    program->compiled = true;
    return SUCCESS;
}

EXPORT int nvrtcGetProgramLogSize(Program* program, size_t* bytes) {
    if (!handles<Program>().knows(program)) {
        return INVALID_PROGRAM;
    }
    *bytes = program->log.size() + 1;
    return SUCCESS;
}

EXPORT int nvrtcGetProgramLog(Program* program, char* log) {
    if (!handles<Program>().knows(program)) {
        return INVALID_PROGRAM;
    }
    std::memcpy(log, program->log.c_str(), program->log.size() + 1);
    return SUCCESS;
}

static int image_size(Program* program, size_t* bytes, bool wanted) {
    if (!handles<Program>().knows(program) || !program->compiled) {
        return INVALID_PROGRAM;
    }
    *bytes = wanted ? program->image.size() + 1 : 0;
    return SUCCESS;
}

static int copy_image(Program* program, char* image, bool wanted) {
    if (!handles<Program>().knows(program) || !program->compiled || !wanted) {
        return INVALID_PROGRAM;
    }
    std::memcpy(image, program->image.c_str(), program->image.size() + 1);
    return SUCCESS;
}

// As the real one: binary code only for a real architecture (sm_90a). PTX there is always.
EXPORT int nvrtcGetCUBINSize(Program* program, size_t* bytes) {
    return image_size(program, bytes, program->binary);
}

EXPORT int nvrtcGetCUBIN(Program* program, char* image) {
    return copy_image(program, image, program->binary);
}

EXPORT int nvrtcGetPTXSize(Program* program, size_t* bytes) {
    return image_size(program, bytes, true);
}

EXPORT int nvrtcGetPTX(Program* program, char* image) {
    return copy_image(program, image, true);
}
