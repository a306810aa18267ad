// The one error type and the one host check. Every message names the argument, what came, what was expected, and the fix.
#pragma once
#include <fmt/format.h>

#include <stdexcept>
#include <string>

namespace machmoe {

// The numeric values are those of the C ABI.
enum class Status : int { Ok = 0, InvalidArgument = 1, Unsupported = 2, WorkspaceTooSmall = 3, OutOfMemory = 4, Backend = 5, Internal = 6 };

class Error : public std::runtime_error {
 public:
  Error(Status status, const std::string& message) : std::runtime_error(message), status_(status) {}
  Status status() const { return status_; }

 private:
  Status status_;
};

}  // namespace machmoe

// MACHMOE_CHECK(x.d % 8 == 0, "d is {}, expected a multiple of 8: pad the hidden size", x.d)
#define MACHMOE_CHECK(cond, ...)                                                                       \
  do {                                                                                                 \
    if (!(cond)) throw ::machmoe::Error(::machmoe::Status::InvalidArgument, fmt::format(__VA_ARGS__)); \
  } while (0)
#define MACHMOE_SUPPORTED(cond, ...)                                                               \
  do {                                                                                             \
    if (!(cond)) throw ::machmoe::Error(::machmoe::Status::Unsupported, fmt::format(__VA_ARGS__)); \
  } while (0)
