"""What a training step would cost on hardware that is not here: memory, cycles, collectives.

hardware knows chips and topologies, libtpu brings the TPU compiler, program reads what it compiled, estimate puts
them together.
"""
