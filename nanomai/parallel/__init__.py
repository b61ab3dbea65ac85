"""Parallelism as a transform: `parallelize(model, mesh, config)`; the model itself knows no rank."""
