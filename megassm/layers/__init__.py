"""nn.Modules that know no rank."""
