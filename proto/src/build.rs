//! Generates Rust from `.proto` files, services included. For build scripts.
//!
//! A service `Echo` becomes three types: `EchoClient`, which makes calls through any [`Caller`](crate::rpc::Caller); a
//! trait `Echo` to implement; and `EchoServer`, to add to a [`Router`](crate::rpc::Router). No `protoc` is needed.
//!
//! ```no_run
//! // build.rs
//! fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     weft_proto::build::compile(&["echo.proto"], &["schema"])
//! }
//! ```

use std::{env, error::Error, fmt::Write, fs, path::PathBuf};

use prost::Message;
use prost_build::{Config, Method, Service, ServiceGenerator};

/// The path of the types that generated code uses.
const RPC: &str = "::weft_proto::rpc";

/// Generates Rust for `files` in the folders `includes`, and writes it to `$OUT_DIR`: one file `<package>.rs` for each
/// package, to be included with `include!`, and the encoded schemas as `descriptors.bin`.
///
/// # Errors
/// Returns an error if a file is missing or invalid, or if `$OUT_DIR` cannot be written.
pub fn compile(files: &[&str], includes: &[&str]) -> Result<(), Box<dyn Error>> {
    for include in includes {
        println!("cargo::rerun-if-changed={include}");
    }
    let descriptors = protox::compile(files, includes)?;
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    Config::new()
        .bytes(["."])
        .service_generator(Box::new(Generator))
        .compile_fds(descriptors)?;
    Ok(())
}

/// Generates clients and servers. For [`Config::service_generator`], if [`compile`] is not enough.
#[derive(Debug, Clone, Copy, Default)]
pub struct Generator;

impl ServiceGenerator for Generator {
    fn generate(&mut self, service: Service, buffer: &mut String) {
        // Writing to a string does not fail.
        let _ = write_client(&service, buffer);
        let _ = write_trait(&service, buffer);
        let _ = write_server(&service, buffer);
    }
}

fn docs(comments: &prost_build::Comments, indent: &str, otherwise: &str) -> String {
    let lines: Vec<_> = comments
        .leading
        .iter()
        .map(|line| line.trim_end())
        .collect();
    match lines.iter().all(|line| line.is_empty()) {
        true => format!("{indent}/// {otherwise}\n"),
        false => lines
            .iter()
            .map(|line| format!("{indent}/// {}\n", line.trim_start()))
            .collect(),
    }
}

/// Returns the name of a service on the wire: `package.Service`.
fn full_name(service: &Service) -> String {
    match service.package.is_empty() {
        true => service.proto_name.clone(),
        false => format!("{}.{}", service.package, service.proto_name),
    }
}

fn is_idempotent(method: &Method) -> bool {
    // IDEMPOTENCY_UNKNOWN is 0; the other values are NO_SIDE_EFFECTS and IDEMPOTENT.
    method.options.idempotency_level.unwrap_or_default() != 0
}

fn write_client(service: &Service, to: &mut String) -> std::fmt::Result {
    let name = &service.name;
    let full = full_name(service);
    write!(
        to,
        "{}",
        docs(&service.comments, "", &format!("Calls `{full}`."))
    )?;
    writeln!(to, "#[derive(Debug, Clone)]")?;
    writeln!(
        to,
        "pub struct {name}Client<C>(::weft_proto::rpc::Client<C>);"
    )?;
    writeln!(to, "impl<C: ::weft_proto::rpc::Caller> {name}Client<C> {{")?;
    writeln!(
        to,
        "    /// Creates a client that makes calls through `caller`."
    )?;
    writeln!(
        to,
        "    pub fn new(caller: C) -> Self {{ Self(::weft_proto::rpc::Client::new(caller)) }}"
    )?;
    writeln!(
        to,
        "    /// Sets the deadline of every call, from its start."
    )?;
    writeln!(to, "    #[must_use]")?;
    writeln!(
        to,
        "    pub fn with_timeout(mut self, timeout: ::std::time::Duration) -> Self {{ \
         self.0.options_mut().timeout = Some(timeout); self }}"
    )?;
    writeln!(to, "    /// Sets the metadata of every call.")?;
    writeln!(to, "    #[must_use]")?;
    writeln!(
        to,
        "    pub fn with_metadata(mut self, metadata: ::weft_proto::rpc::Metadata) -> Self {{ \
         self.0.options_mut().metadata = metadata; self }}"
    )?;
    for method in &service.methods {
        let (i, o) = (&method.input_type, &method.output_type);
        let call = &method.name;
        let info = format!(
            "{RPC}::Method {{ name: ::std::borrow::Cow::Borrowed(\"{full}/{}\"), idempotent: {} }}",
            method.proto_name,
            is_idempotent(method)
        );
        write!(
            to,
            "{}",
            docs(
                &method.comments,
                "    ",
                &format!("Calls `{}`.", method.proto_name)
            )
        )?;
        writeln!(to, "    ///")?;
        writeln!(to, "    /// # Errors")?;
        writeln!(to, "    /// The status of the call, if it failed.")?;
        let request = format!("request: impl Into<{RPC}::Attached<{i}>>");
        let (takes, gives, body) = match (method.client_streaming, method.server_streaming) {
            (false, false) => (
                format!("&self, {request}"),
                format!("{RPC}::Attached<{o}>"),
                format!("self.0.unary({info}, request.into()).await"),
            ),
            (false, true) => (
                format!("&self, {request}"),
                format!("{RPC}::Messages<{o}>"),
                format!("self.0.server_streaming({info}, request.into()).await"),
            ),
            (true, false) => (
                "&self".to_owned(),
                format!("({RPC}::Sink<{i}>, {RPC}::Answer<{o}>)"),
                format!("self.0.client_streaming({info}).await"),
            ),
            (true, true) => (
                "&self".to_owned(),
                format!("({RPC}::Sink<{i}>, {RPC}::Messages<{o}>)"),
                format!("self.0.streaming({info}).await"),
            ),
        };
        writeln!(
            to,
            "    pub async fn {call}({takes}) -> Result<{gives}, {RPC}::Status> {{ {body} }}"
        )?;
    }
    writeln!(to, "}}")
}

fn write_trait(service: &Service, to: &mut String) -> std::fmt::Result {
    let full = full_name(service);
    write!(
        to,
        "{}",
        docs(&service.comments, "", &format!("Answers `{full}`."))
    )?;
    writeln!(to, "pub trait {}: Send + Sync + 'static {{", service.name)?;
    for method in &service.methods {
        let (i, o) = (&method.input_type, &method.output_type);
        let (takes, gives) = match (method.client_streaming, method.server_streaming) {
            (false, false) => (
                format!("request: ::weft_proto::rpc::Attached<{i}>"),
                format!("::weft_proto::rpc::Attached<{o}>"),
            ),
            (false, true) => (
                format!("request: {RPC}::Attached<{i}>, responses: {RPC}::Sink<{o}>"),
                "()".to_owned(),
            ),
            (true, false) => (
                format!("requests: ::weft_proto::rpc::Messages<{i}>"),
                format!("::weft_proto::rpc::Attached<{o}>"),
            ),
            (true, true) => (
                format!("requests: {RPC}::Messages<{i}>, responses: {RPC}::Sink<{o}>"),
                "()".to_owned(),
            ),
        };
        write!(
            to,
            "{}",
            docs(
                &method.comments,
                "    ",
                &format!("Answers `{}`.", method.proto_name)
            )
        )?;
        writeln!(
            to,
            "    fn {}(&self, context: {RPC}::Context, {takes}) -> \
             impl ::std::future::Future<Output = Result<{gives}, {RPC}::Status>> + Send;",
            method.name
        )?;
    }
    writeln!(to, "}}")
}

fn write_server(service: &Service, to: &mut String) -> std::fmt::Result {
    let name = &service.name;
    writeln!(
        to,
        "/// Serves a [`{name}`], to add to a [`Router`](::weft_proto::rpc::Router)."
    )?;
    writeln!(to, "#[derive(Debug)]")?;
    writeln!(to, "pub struct {name}Server<T>(::std::sync::Arc<T>);")?;
    writeln!(to, "impl<T: {name}> {name}Server<T> {{")?;
    writeln!(to, "    /// Creates a server for an implementation.")?;
    writeln!(
        to,
        "    pub fn new(service: T) -> Self {{ Self(::std::sync::Arc::new(service)) }}"
    )?;
    writeln!(to, "}}")?;
    writeln!(
        to,
        "impl<T: {name}> ::weft_proto::rpc::Service for {name}Server<T> {{"
    )?;
    writeln!(
        to,
        "    const NAME: &'static str = \"{}\";",
        full_name(service)
    )?;
    writeln!(
        to,
        "    fn call(&self, method: &str, context: {RPC}::Context, streams: {RPC}::Streams) -> \
         Option<{RPC}::Ended> {{"
    )?;
    writeln!(
        to,
        "        let service = ::std::sync::Arc::clone(&self.0);"
    )?;
    writeln!(to, "        match method {{")?;
    for method in &service.methods {
        let call = &method.name;
        let body = match (method.client_streaming, method.server_streaming) {
            (false, false) => format!(
                "let (request, respond) = streams.unary().await?; \
                 respond.with(service.{call}(context, request).await).await"
            ),
            (false, true) => format!(
                "let (request, responses) = streams.server_streaming().await?; \
                 service.{call}(context, request, responses).await"
            ),
            (true, false) => format!(
                "let (requests, respond) = streams.client_streaming(); \
                 respond.with(service.{call}(context, requests).await).await"
            ),
            (true, true) => format!(
                "let (requests, responses) = streams.streaming(); \
                 service.{call}(context, requests, responses).await"
            ),
        };
        writeln!(
            to,
            "            \"{}\" => Some(Box::pin(async move {{ {body} }})),",
            method.proto_name
        )?;
    }
    writeln!(to, "            _ => None,")?;
    writeln!(to, "        }}")?;
    writeln!(to, "    }}")?;
    writeln!(to, "}}")
}
