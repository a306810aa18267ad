# cmake -DFOLDER=<scratch> -DGENERATOR=<generator> -P nvcc.cmake: an nvcc that cannot build the CUDA backend is passed over, or refused, with a sentence.
set(nvcc ${FOLDER}/nvcc)
function(expect sentence script)
  file(WRITE ${nvcc} "#!/bin/sh\n${script}\n")
  file(CHMOD ${nvcc} PERMISSIONS OWNER_READ OWNER_WRITE OWNER_EXECUTE)
  foreach(mode AUTO ON)
    execute_process(COMMAND ${CMAKE_COMMAND} --fresh -G ${GENERATOR} -S ${CMAKE_CURRENT_LIST_DIR}/../.. -B ${FOLDER}/build -DMACHMOE_CUDA=${mode}
                            -DCMAKE_CUDA_COMPILER=${nvcc} -DMACHMOE_TESTS=OFF -DMACHMOE_BENCH=OFF
                    RESULT_VARIABLE failed OUTPUT_VARIABLE log ERROR_VARIABLE log)
    string(REGEX REPLACE "[ \n]+" " " log "${log}")
    string(FIND "${log}" "${sentence}; needed are nvcc of CUDA 12.5 or later" at)
    if(at EQUAL -1 OR (mode STREQUAL "AUTO" AND failed) OR (mode STREQUAL "ON" AND NOT failed))
      message(FATAL_ERROR "MACHMOE_CUDA=${mode}, expected \"${sentence}\", got exit status ${failed} and\n${log}")
    endif()
  endforeach()
endfunction()

set(release "Cuda compilation tools, release")
expect("${nvcc} is of CUDA 12.0" "echo ${release} 12.0, V12.0.140")
expect("${nvcc} --version tells no release" "exit 1")
expect("${nvcc} of CUDA 12.8 does not compile cmake/cuda_probe.cu (error: unsupported GNU version)"
       "[ $1 = --version ] && echo ${release} 12.8, V12.8.93 || { echo error: unsupported GNU version; exit 1; }")
