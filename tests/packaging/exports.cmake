# cmake -DNM=<nm> -DLIBRARY=<libmachmoe.so> -P exports.cmake: the shared library exports the C ABI alone.
execute_process(COMMAND ${NM} -D --defined-only --format=posix ${LIBRARY} OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
string(REGEX MATCHALL "[^\n]+" symbols "${symbols}")
list(FILTER symbols EXCLUDE REGEX "^machmoe_")
if(symbols)
  list(JOIN symbols "\n  " symbols)
  message(FATAL_ERROR "${LIBRARY} exports, beside machmoe_*:\n  ${symbols}")
endif()
