#pragma once
/// How the engine says that a kernel broke a rule.

#include <cstdint>
#include <string>

#include "arch/arch.h"

namespace qwen1m::arch::emu {

/// Thrown through every fiber when the launch cannot go on.
struct Aborted {};

/// Adds an issue to the report of the running launch, with the running thread, unless one of the
/// same kind, site and `other` place is in it already.
void report_issue(const char* kind, Site site, const std::string& message,
                  const std::string& other = "");
/// The same, and ends the launch.
[[noreturn]] void report_fatal(const char* kind, Site site, const std::string& message);

/// "kernel.h:12"
std::string site_text(Site site);
/// A small number for a site; `site_of` is its inverse.
uint16_t site_index(Site site);
Site site_of(uint16_t index);

/// "shared+128": an offset in the block's dynamic shared memory.
std::string shared_text(uint32_t offset);

}  // namespace qwen1m::arch::emu
