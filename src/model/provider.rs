//! Models of providers.
