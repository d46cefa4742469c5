"""The generated English from which the embedded base is pre-trained."""
