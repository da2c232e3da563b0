//! What a guest needs of its host.
