"""The paper's experiments and its open questions, as code: arms, trainings, measurements, tables and plots."""
