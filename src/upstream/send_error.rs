//! Failures of sending a request, classified by the effect that the request may have had.

use axum::extract::Request;
use hyper::client::conn::TrySendError;

use crate::error::{BoxError, Error};

/// Reasons why there is no response.
#[derive(Debug)]
pub(super) enum SendError {
    /// Nothing was sent. The request comes back in this variant.
    Unsent(Box<Request>, BoxError),
    /// Some of the request was sent, but upstream has stated that it did not process it.
    Unprocessed(BoxError),
    /// The data that came back is not HTTP.
    NotHttp(BoxError),
    /// The connection or the stream ended. The request may have been carried out.
    Disconnected(BoxError),
}

// === impl SendError ===

impl SendError {
    /// Returns the error of the request. If it is [`Unsent`](Self::Unsent), call this only if no other
    /// connection can send it.
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
