//! Many protocols on one connection.
