// A shared library that may not be there, by the functions that are looked up in it.

#pragma once

#include <dlfcn.h>

#include <initializer_list>

namespace kpdeploy {

class SharedLibrary {
 public:
  // The first of `names` that can be opened. One that the process has loaded already comes before all others: torch and
  // ONNX Runtime's CUDA provider bring their own.
  explicit SharedLibrary(std::initializer_list<const char*> names) {
    for (const int how : {RTLD_NOLOAD, 0})
      for (const char* name : names)
        if (!file_) file_ = dlopen(name, RTLD_LAZY | RTLD_LOCAL | how);
  }

  // Sets `function` to the one of this name; `complete` is whether all that were asked for so far are there.
  template <class Function>
  void look_up(Function*& function, const char* name) {
    function = file_ ? reinterpret_cast<Function*>(dlsym(file_, name)) : nullptr;
    complete_ = complete_ && function;
  }

  bool complete() const { return complete_; }

 private:
  void* file_ = nullptr;
  bool complete_ = true;
};

}  // namespace kpdeploy
