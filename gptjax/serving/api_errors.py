"""Errors of the HTTP interface, as the error objects of OpenAI's API."""

from collections.abc import Mapping
from typing import Any

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """A request that is answered with an error object.

    Attributes:
      status: HTTP status code.
      message: one sentence that names the cause.
      param: the parameter at fault, such as "messages[0].content"; None: no single one.
      code: identifier that programs may test, such as "context_length_exceeded"; None: none.
      headers: further headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Returns the error object."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Returns the error of a request that can never succeed: status 400."""
    return ApiError(400, message, param=param, code=code)
