"""How fast cnn_ext is beside torch: ``python -m benchmarks``. README.md in this directory says how it measures."""
