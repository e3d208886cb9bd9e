// Which instruction sets this machine has, of those the library was built for (the build lists them in TOKENOPS_ISAS).
#pragma once

#include <string>

namespace tokenops {

#define X(isa) isa,
enum class Isa { TOKENOPS_ISAS };  // worst to best: each includes the ones before it
#undef X

// "" is the best one; an unknown name or one that this machine lacks is an error
Isa isa_of(const std::string& name);

}  // namespace tokenops
