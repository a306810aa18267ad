# The C and C++ package: library, headers, find_package(machmoe CONFIG) and pkg-config. Relocatable.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)
set(MACHMOE_PACKAGE_DIR ${CMAKE_INSTALL_LIBDIR}/cmake/machmoe)
install(TARGETS machmoe EXPORT machmoe-targets LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(DIRECTORY include/machmoe DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} FILES_MATCHING PATTERN "*.h" PATTERN "*.hpp")
install(EXPORT machmoe-targets NAMESPACE machmoe:: DESTINATION ${MACHMOE_PACKAGE_DIR} FILE machmoe-config.cmake)
write_basic_package_version_file(${CMAKE_CURRENT_BINARY_DIR}/machmoe-config-version.cmake COMPATIBILITY SameMajorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/machmoe-config-version.cmake DESTINATION ${MACHMOE_PACKAGE_DIR})

file(RELATIVE_PATH MACHMOE_PREFIX_FROM_PC /prefix/${CMAKE_INSTALL_LIBDIR}/pkgconfig /prefix)
configure_file(cmake/machmoe.pc.in machmoe.pc @ONLY)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/machmoe.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
