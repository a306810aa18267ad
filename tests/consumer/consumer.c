/* The C API from C: versions agree, a wrong descriptor gets a sentence. */
#include <machmoe/machmoe.h>
#include <stdio.h>
#include <string.h>

int main(void) {
  int major, minor, patch;
  machmoe_version(&major, &minor, &patch);
  if (major != MACHMOE_VERSION_MAJOR || minor != MACHMOE_VERSION_MINOR) return 1;
  machmoe_layer layer;
  memset(&layer, 0, sizeof layer);
  layer.struct_size = sizeof layer;
  layer.T = -1;
  size_t bytes;
  if (machmoe_forward_workspace_bytes(&layer, &bytes) != MACHMOE_INVALID_ARGUMENT || !*machmoe_last_error()) return 2;
  printf("%s\n", machmoe_build_info());
  return 0;
}
