//! One event: those fields of TensorFlow's `event.proto` and `summary.proto` that are written here, with their numbers.
//!
//! They are few and frozen, and declared here by hand: no `protoc` is needed to build.

use prost::{Message, Oneof};

/// `tensorflow.Event`
#[derive(Clone, PartialEq, Message)]
pub struct Event {
    /// Seconds since 1970.
    #[prost(double, tag = "1")]
    pub wall_time: f64,
    /// Batches done.
    #[prost(int64, tag = "2")]
    pub step: i64,
    /// What happened.
    #[prost(oneof = "What", tags = "3, 5, 7")]
    pub what: Option<What>,
}

/// What happened.
#[derive(Clone, PartialEq, Oneof)]
pub enum What {
    /// The first event of a file says what it is.
    #[prost(string, tag = "3")]
    FileVersion(String),
    /// Something was measured.
    #[prost(message, tag = "5")]
    Summary(Summary),
    /// A run started, or went on.
    #[prost(message, tag = "7")]
    SessionLog(SessionLog),
}

/// `tensorflow.Summary`
#[derive(Clone, PartialEq, Message)]
pub struct Summary {
    /// By tag.
    #[prost(message, repeated, tag = "1")]
    pub value: Vec<Value>,
}

/// `tensorflow.Summary.Value`
#[derive(Clone, PartialEq, Message)]
pub struct Value {
    /// Its name; what is before the first `/` is the group it is shown in.
    #[prost(string, tag = "1")]
    pub tag: String,
    /// Itself.
    #[prost(oneof = "Shown", tags = "2, 4")]
    pub shown: Option<Shown>,
}

/// What a value is.
#[derive(Clone, PartialEq, Oneof)]
pub enum Shown {
    /// A point of a curve.
    #[prost(float, tag = "2")]
    Scalar(f32),
    /// A picture.
    #[prost(message, tag = "4")]
    Image(Image),
}

/// `tensorflow.Summary.Image`
#[derive(Clone, PartialEq, Message)]
pub struct Image {
    /// Pixels.
    #[prost(int32, tag = "1")]
    pub height: i32,
    /// Pixels.
    #[prost(int32, tag = "2")]
    pub width: i32,
    /// Channels: 3 for RGB.
    #[prost(int32, tag = "3")]
    pub colorspace: i32,
    /// The file, PNG for instance.
    #[prost(bytes = "vec", tag = "4")]
    pub encoded: Vec<u8>,
}

/// `tensorflow.SessionLog`
#[derive(Clone, PartialEq, Message)]
pub struct SessionLog {
    /// [`SessionLog::START`]
    #[prost(int32, tag = "1")]
    pub status: i32,
}

impl SessionLog {
    /// From here on the run goes on: what came before of this step and later ones does not count.
    pub const START: i32 = 1;
}

impl Value {
    /// A point of a curve.
    pub fn scalar(tag: impl Into<String>, value: f32) -> Self {
        Value { tag: tag.into(), shown: Some(Shown::Scalar(value)) }
    }

    /// A picture of three channels, as a PNG file.
    pub fn picture(tag: impl Into<String>, height: usize, width: usize, png: Vec<u8>) -> Self {
        let image = Image { height: height as i32, width: width as i32, colorspace: 3, encoded: png };
        Value { tag: tag.into(), shown: Some(Shown::Image(image)) }
    }
}
