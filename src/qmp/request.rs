//! One request of a client: a command's name, its arguments, and the id to echo.

use serde_json::{Map, Value};

use super::command::{Command, ProtocolCommand};
use super::error::QmpError;

/// What a client asked for.
#[derive(Clone, Debug, PartialEq)]
pub enum Request {
    /// For the server.
    Protocol(ProtocolCommand),
    /// For the guest.
    Guest(Command),
}

/// Reads the JSON text of one request: the id to echo, if it has one, and the request or what is wrong with it.
pub fn parse(text: &[u8]) -> (Option<Value>, Result<Request, QmpError>) {
    let mut object: Map<String, Value> = match serde_json::from_slice(text) {
        Ok(object) => object,
        Err(error) => return (None, Err(QmpError::generic(format!("JSON parse error, {error}")))),
    };
    let id = object.remove("id");
    (id, parse_object(object))
}

fn parse_object(mut object: Map<String, Value>) -> Result<Request, QmpError> {
    let name = match object.remove("execute") {
        Some(Value::String(name)) => name,
        Some(_) => return Err(QmpError::generic("QMP input member 'execute' must be a string")),
        None => return Err(QmpError::generic("QMP input lacks member 'execute'")),
    };
    let arguments = match object.remove("arguments") {
        Some(Value::Object(arguments)) => arguments,
        Some(_) => return Err(QmpError::generic("QMP input member 'arguments' must be an object")),
        None => Map::new(),
    };
    if let Some(unexpected) = object.keys().next() {
        return Err(QmpError::generic(format!("QMP input member '{unexpected}' is unexpected")));
    }
    if let Some(command) = ProtocolCommand::parse(&name, &arguments) {
        return command.map(Request::Protocol);
    }
    match Command::parse(&name, &arguments) {
        Some(command) => command.map(Request::Guest),
        None => Err(QmpError::command_not_found(format!("The command {name} has not been found"))),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::qmp::error::ErrorClass;

    #[test]
    fn id_comes_back_even_with_an_error() {
        let (id, request) = parse(br#"{"execute": "stop", "id": {"any": ["thing"]}}"#);
        assert_eq!((id, request), (Some(json!({ "any": ["thing"] })), Ok(Request::Guest(Command::Stop))));
        let (id, request) = parse(br#"{"execute": "no-such-command", "id": 7}"#);
        assert_eq!(id, Some(json!(7)));
        assert_eq!(request.unwrap_err().class, ErrorClass::CommandNotFound);
    }

    #[test]
    fn malformed_requests_say_what_is_wrong() {
        let bad = [
            (&br#"{}"#[..], "lacks member 'execute'"),
            (br#"{"execute": true}"#, "'execute' must be a string"),
            (br#"{"execute": "stop", "arguments": []}"#, "'arguments' must be an object"),
            (br#"{"execute": "stop", "extra": 1}"#, "'extra' is unexpected"),
            (br#"{"execute" "stop"}"#, "JSON parse error"),
            (b"{\"execute\": \"\xc0\xc1\"}", "JSON parse error"),
        ];
        for (text, expected) in bad {
            let error = parse(text).1.unwrap_err();
            assert!(error.class == ErrorClass::GenericError && error.desc.contains(expected), "{error}");
        }
    }
}
