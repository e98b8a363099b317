// Calls that follow each other, made without a word to Python between them.

#include <cstdint>

struct Run {
  void (*const *functions)(const void *);
  const void *const *arguments;
  int64_t count;
};

extern "C" int64_t size_of_run() { return sizeof(Run); }

extern "C" void run(const Run *c) {
  for (int64_t i = 0; i < c->count; i++) c->functions[i](c->arguments[i]);
}
