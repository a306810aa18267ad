# cmake -DBUILD=<build folder> -DGENERATOR=<its generator> -DLIBDIR=<its CMAKE_INSTALL_LIBDIR> -DFLAGS=<compiler flags> -P run.cmake: installs BUILD,
# builds and runs the consumer against it with find_package and with pkg-config; then the same in other layouts.
set(root ${BUILD}/consumer)
file(REMOVE_RECURSE ${root})
function(run)
  execute_process(COMMAND ${ARGN} COMMAND_ERROR_IS_FATAL ANY OUTPUT_QUIET)
endfunction()

function(consume folder libraries)   # the package whose library lies in folder/libraries; ARGN tells CMake where it is
  run(${CMAKE_COMMAND} -G ${GENERATOR} -S ${CMAKE_CURRENT_FUNCTION_LIST_DIR} -B ${folder}/build ${ARGN} -DCMAKE_C_FLAGS=${FLAGS} -DCMAKE_CXX_FLAGS=${FLAGS})
  run(${CMAKE_COMMAND} --build ${folder}/build)
  run(${folder}/build/consumer_c)
  run(${folder}/build/consumer_cpp)

  execute_process(COMMAND ${CMAKE_COMMAND} -E env PKG_CONFIG_PATH=${folder}/${libraries}/pkgconfig pkg-config --cflags --libs machmoe
                  OUTPUT_VARIABLE flags OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  separate_arguments(flags UNIX_COMMAND "${flags} ${FLAGS}")
  run(cc ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/consumer.c -o ${folder}/consumer_pc ${flags} -Wl,-rpath,${folder}/${libraries})
  run(${folder}/consumer_pc)
endfunction()

function(configure folder)   # a build folder of another layout, ARGN, with the library of BUILD in it
  run(${CMAKE_COMMAND} -G ${GENERATOR} -S ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/../.. -B ${folder} -DMACHMOE_CUDA=OFF -DMACHMOE_TESTS=OFF -DMACHMOE_BENCH=OFF
      -DMACHMOE_EXAMPLES=OFF ${ARGN})
  file(GLOB library ${BUILD}/libmachmoe.so*)
  file(COPY ${library} DESTINATION ${folder})
endfunction()

run(${CMAKE_COMMAND} --install ${BUILD} --prefix ${root}/usual/prefix)
consume(${root}/usual prefix/${LIBDIR} -DCMAKE_PREFIX_PATH=${root}/usual/prefix)

configure(${root}/versioned/library -DCMAKE_INSTALL_LIBDIR=lib/v0 -DCMAKE_INSTALL_INCLUDEDIR=include/v0)
run(${CMAKE_COMMAND} --install ${root}/versioned/library --prefix ${root}/versioned/prefix)
consume(${root}/versioned prefix/lib/v0 -Dmachmoe_DIR=${root}/versioned/prefix/lib/v0/cmake/machmoe)

configure(${root}/absolute/library -DCMAKE_INSTALL_PREFIX=${root}/absolute -DCMAKE_INSTALL_LIBDIR=${root}/absolute/libraries
           -DCMAKE_INSTALL_INCLUDEDIR=${root}/absolute/headers)
run(${CMAKE_COMMAND} --install ${root}/absolute/library)
consume(${root}/absolute libraries -Dmachmoe_DIR=${root}/absolute/libraries/cmake/machmoe)
