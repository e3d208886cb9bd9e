// Which instruction sets this machine has, of those the library was built for (the build lists them in TOKENOPS_ISAS), and the
// loops of a room compiled for one of them.
#pragma once

#include <string>

namespace tokenops {

#define X(isa) isa,
enum class Isa { TOKENOPS_ISAS };  // worst to best: each includes the ones before it
#undef X

// "" is the best one; an unknown name or one that this machine lacks is an error
Isa isa_of(const std::string& name);

// each room's <room>_isa.cpp specialises it for its table of loops, once per instruction set
#define X(isa)           \
  namespace isa {        \
  template <class Loops> \
  const Loops& loops();  \
  }
TOKENOPS_ISAS
#undef X

template <class Loops>
const Loops& loops_of(const std::string& name) {
  switch (isa_of(name)) {
#define X(isa) \
  case Isa::isa: return isa::loops<Loops>();
    TOKENOPS_ISAS
#undef X
  }
  return generic::loops<Loops>();
}

}  // namespace tokenops
