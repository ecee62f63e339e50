"""The ground floor: errors, configuration, files, randomness, progress. Imports nothing of Longspan above it."""
