# What was found, what was not, and which variable changes it: printed at the end of the configuration and installed beside the modules.
if(CNN_EXT_HAS_CUDA)
  set(cuda "${CMAKE_CUDA_COMPILER} ${CMAKE_CUDA_COMPILER_VERSION}, architectures ${CNN_EXT_CUDA_ARCH_WORDS} and PTX")
else()
  set(cuda "not built: ${CNN_EXT_CUDA_REASON}")
endif()
list(JOIN CNN_EXT_ISAS " " isas)
set(CNN_EXT_SUMMARY
"cnn_ext is being built with
  C++ compiler  ${CMAKE_CXX_COMPILER} (${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION})   [CXX]
  CPU kernels   ${isas}   [all are built; CNN_EXT_ISA chooses at run time]
  OpenMP        -fopenmp, without a runtime of its own: torch's serves
  CUDA          ${cuda}   [CNN_EXT_CUDA=auto|on|off, CNN_EXT_CUDA_ARCHS, CUDACXX, CUDA_HOME]
")
message(STATUS "${CNN_EXT_SUMMARY}")
file(WRITE "${CMAKE_CURRENT_BINARY_DIR}/_build_summary.txt" "${CNN_EXT_SUMMARY}")
if(CNN_EXT_PYTHON)
  install(FILES "${CMAKE_CURRENT_BINARY_DIR}/_build_summary.txt" DESTINATION .)
endif()
