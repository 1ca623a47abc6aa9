//! Failures to send a request, by what upstream may have done.

use axum::extract::Request;
use hyper::client::conn::TrySendError;

use crate::error::{BoxError, Error};

/// Why there is no answer.
#[derive(Debug)]
pub(super) enum SendError {
    /// Nothing was sent. This is the request.
    Unsent(Box<Request>, BoxError),
    /// Upstream says that it has not processed the request, of which some was sent.
    Unprocessed(BoxError),
    /// What came is not HTTP.
    NotHttp(BoxError),
    /// The connection or the stream ended. The request may have been carried out.
    Disconnected(BoxError),
}

// === impl SendError ===

impl SendError {
    /// The error of the request, unless it is [`Unsent`](Self::Unsent) and can go on.
    pub(super) fn into_error(self) -> Error {
        match self {
            Self::Unsent(_, cause) | Self::Unprocessed(cause) => Error::Unreachable(cause),
            Self::NotHttp(cause) => Error::NotHttp(cause),
            Self::Disconnected(cause) => Error::Disconnected(cause),
        }
    }
}

impl From<TrySendError<Request>> for SendError {
    fn from(mut error: TrySendError<Request>) -> Self {
        match error.take_message() {
            Some(request) => Self::Unsent(Box::new(request), error.into_error().into()),
            None if error.error().is_parse() => Self::NotHttp(error.into_error().into()),
            None => Self::Disconnected(error.into_error().into()),
        }
    }
}
