"""The embedded task: handwritten digits of scikit-learn, with models that train in minutes."""
