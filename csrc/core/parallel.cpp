#include "parallel.h"

#include <pthread.h>

namespace vtok {

static bool forked = false;

// Runs when the module is loaded.
static const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked = true; });

bool in_forked_child() {
  (void)fork_handler;
  return forked;
}

}  // namespace vtok
