"""Every knob of a run, what must hold between them, and how they are read. Imports no torch."""
